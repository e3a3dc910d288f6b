"""What lies in rows of channels, and where the rows' room is. Kernels get it as the layout "rows"."""

import torch
from helpers import random
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels.backends import prepared
from dbp_kernels.backends.rows import empty, has_room, in_rows, padded, to_rows, widened


def wide(channels: int) -> torch.Tensor:
    """(2, channels, 4, 4) in channels-last order."""
    return torch.zeros(2, 4, 4, channels).movedim(-1, 1)


def unused(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("it was packed")


def test_what_lies_in_rows():
    x = wide(16)
    assert in_rows(x)
    assert in_rows(x[:, :8, 1:, ::2])
    assert in_rows(x[:1].expand(3, 16, 4, 4))
    assert in_rows(x[:, :6])  # the room behind are other channels
    assert in_rows(torch.zeros(4, 4, 2, 16).permute(2, 3, 0, 1))  # the batch inside
    assert not in_rows(x[:, 1:9])  # rows begin off a 16-byte boundary
    assert not in_rows(wide(6))  # rows follow each other without room
    assert not in_rows(x.contiguous())


def test_the_last_row_needs_its_room_as_well():
    memory = torch.zeros(2 * 8 + 8)
    x = memory.as_strided((3, 5), (8, 1))
    assert in_rows(x)
    assert has_room(x)
    short = memory[:22].clone().as_strided((3, 5), (8, 1))
    assert not in_rows(short)
    assert not has_room(short)
    moved = torch.zeros(4 + 24 - 1)[4:].as_strided((3, 5), (8, 1))
    assert not in_rows(moved)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_widened_rows_are_the_image_and_its_room(shape, dtype):
    whole = empty(random(shape, dtype)).fill_(7)
    x = whole[:, : shape[1]].copy_(random(shape, dtype))
    steps, form = to_rows(x, unused)
    assert (form.shape, form.stride()) == (whole.shape, whole.stride())
    for step in steps:
        x = step(x)
    assert x.data_ptr() == whole.data_ptr()
    assert torch.equal(x, whole)
    assert x.shape[1] == padded(shape[1], dtype)
    assert bool(steps) == (shape[1] != x.shape[1])


def test_what_does_not_lie_in_rows_is_packed():
    x = wide(6)
    steps, form = to_rows(x, unused)
    assert steps == (unused,)
    assert form.shape == (2, 8, 4, 4)
    assert in_rows(form)
    assert widened(wide(8)).shape == (2, 8, 4, 4)


def test_what_is_prepared_for_rows_with_room_is_not_for_rows_without():
    made = []

    @prepared.prepared
    def make(x):
        made.append(has_room(x))
        return lambda: None

    memory = torch.zeros(24)
    for storage in (memory, memory[:22].clone(), memory, memory[:22].clone()):
        make(storage.as_strided((3, 5), (8, 1)))
    assert made == [True, False]
