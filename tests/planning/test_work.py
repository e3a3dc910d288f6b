"""The work list alone: a model of the kernels in torch, in float64, must reproduce the definition."""

import pytest
import torch
from helpers import case, cases, moment_error
from hypothesis import given
from hypothesis import strategies as st
from work_model import assembled, partials

from dbp_kernels import reference
from dbp_kernels.backends.tables import make_tables, reciprocal
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W

EXACT = 1e-11  # float64 rounding


def model(x: torch.Tensor, case_, block: int, block_k: int, parallel: int, limit: int = 1 << 26):
    geometry = case_.geometry
    work = W.shift_work(geometry, block, block_k, parallel, limit)
    missing = boxes.AXES - len(geometry.axes)
    x = x.reshape(*x.shape[:2], *(1,) * missing, *x.shape[2:])
    stride = (*(1,) * missing, *(a.stride for a in geometry.axes))
    return assembled(partials(x, work, stride), work, geometry.samples)


@given(
    case_=cases(),
    block=st.sampled_from([1, 2, 4]),
    block_k=st.sampled_from([1, 2, 8]),
    parallel=st.sampled_from([1, 7, 100]),
)
def test_model_equals_definition(case_, block, block_k, parallel):
    x = case_.input()
    S = model(x, case_, block, block_k, parallel)
    assert moment_error(S, reference.patch_gram(x, *case_.arguments)) < EXACT


@pytest.mark.parametrize("limit", [1, 1 << 26])
def test_many_channel_tiles(limit):
    case_ = case(3, 10, (5, 4), (3, 2), stride=(1, 2), padding=1, groups=2)
    x = case_.input()
    S = model(x, case_, 4, 2, 1000, limit)
    assert moment_error(S, reference.patch_gram(x, *case_.arguments)) < EXACT


def test_direct_program_is_the_product_of_a_matrix_with_itself():
    X = torch.randn(37, 6, dtype=torch.float64)
    work = W.make_work(boxes.direct_program(37), 1, 6, 3, 2, 4, 20)
    assert len(work.items) > len(work.upper)
    S = assembled(partials(X.T.reshape(1, 6, 1, 1, 37), work, (1, 1, 1)), work, 37)
    Z = X.reshape(37, 2, 3).transpose(0, 1)
    assert torch.allclose(S, Z.mT @ Z / 37, rtol=0, atol=EXACT)


def test_a_3x3_kernel_needs_13_products():
    found = boxes.shift_program(case(1, 1, (56, 56), 3, padding=1).geometry.axes).boxes
    main = [b for b in found if b.positions > 56 * 56 // 2]
    assert len(main) == 13
    assert sum(b.symmetric for b in main) == 1


@given(case_=cases(max_batch=40), block_k=st.sampled_from([16, 64]), parallel=st.integers(1, 300))
def test_items_cover_every_box_once(case_, block_k, parallel):
    geometry = case_.geometry
    work = W.shift_work(geometry, 16, block_k, parallel)
    assert len({item.slot for item in work.items}) == len(work.items) == work.slots
    reached = {}
    for item in sorted(work.items, key=lambda t: t.first):
        assert item.first < item.last
        assert item.first % block_k == 0
        key = item.box, item.i, item.j
        assert item.first == reached.get(key, 0)
        reached[key] = item.last
        assert not work.program.boxes[item.box].symmetric or item.i <= item.j
    for (box, _, _), last in reached.items():
        assert last == geometry.batch * work.program.boxes[box].positions


@pytest.mark.parametrize("size", [56, 55, 28, 14])
@pytest.mark.parametrize("parallel", [132, 264, 108])
def test_splits_fill_the_machine_evenly(size, parallel):
    geometry = case(25, 64, (size, size), 3, padding=1).geometry
    work = W.shift_work(geometry, 64, 64, parallel)
    busy = [0] * parallel
    for item in work.items:
        busy[busy.index(min(busy))] += -(-(item.last - item.first) // 64)
    ideal = sum(busy) / parallel
    assert max(busy) <= 1.2 * ideal + 4


def test_workspace_is_bounded_unless_one_part_each_is_more():
    geometry = case(25, 64, (56, 56), 3, padding=1).geometry
    work = W.shift_work(geometry, 64, 64, 10**4, max_workspace=1 << 22)
    assert 4 * work.workspace <= 1 << 22
    least = W.shift_work(geometry, 64, 64, 10**4, max_workspace=1)
    assert set(least.splits) == {1}


def test_pairs_of_groups():
    assert W.tile_pairs(8, 8, 4) == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert W.tile_pairs(8, 1, 4) == ((0, 0), (1, 1))
    # groups of 3: channels 3..5 meet tiles 0 and 1, channels 6..8 tiles 1 and 2
    assert W.tile_pairs(9, 3, 4) == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2))


@given(divisor=st.integers(1, 2**31 - 1), p=st.integers(0, 2**31 - 1))
def test_reciprocal_divides_exactly(divisor, p):
    multiplier, shift = reciprocal(divisor)
    assert multiplier < 2**32
    for number in (p, 0, 2**31 - 1, p // divisor * divisor, max(0, p // divisor * divisor - 1)):
        assert 2 * number * multiplier >> 32 >> shift == number // divisor


def test_tables_are_made_once_and_hold_the_work():
    device = torch.device("cpu")
    geometry = case(2, 5, (6, 5), 3, stride=2, padding=1).geometry
    work = W.shift_work(geometry, 4, 8, 10)
    tables = make_tables(work, device)
    assert tables is make_tables(W.shift_work(geometry, 4, 8, 10), device)
    assert tables.items.shape == (len(work.items), 6)
    assert tables.boxes.shape == (len(work.program.boxes), 15)
    for (first, count, kind), entries, source in zip(
        tables.taps.tolist(), work.lists, work.program.sources
    ):
        assert tuple(tables.slots[first : first + count, 0].tolist()) == entries
        assert kind == source.kind
    assert tables.longest == max(tables.taps[:, 1])
    i, j, straight, transposed = tables.tiles[1].tolist()
    assert (work.pairs[straight], work.pairs[transposed]) == ((i, j), (j, i))


def test_taps_that_read_padding_only_have_no_boxes():
    geometry = case(1, 1, (1,), 2, stride=9, padding=4, dilation=5).geometry
    tables = make_tables(W.shift_work(geometry, 4, 8, 10), torch.device("cpu"))
    assert tables.boxes.shape == (0, 15)
    assert tables.items.shape == (0, 6)
    assert tables.taps.tolist() == [[0, 0, boxes.STRAIGHT]] * 4
    assert tables.longest == 0


def test_too_many_pixels_are_refused():
    geometry = case(2**20, 1, (2**11,), 1).geometry
    with pytest.raises(ValueError, match="batch=1048576"):
        W.shift_work(geometry, 16, 16, 1)
