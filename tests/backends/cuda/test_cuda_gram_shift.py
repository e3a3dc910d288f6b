"""The staged-halo kernel and the box kernel: emulated, and from compiled PTX."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from emulation import LaunchError, call, record, run_ptx, unneeded
from gram import box_arguments, check, poisoned, reduce, rows_of_channels, shift_arguments
from helpers import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.backends.cuda.shift_plan import Shape, shift_plan
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W
from dbp_kernels.planning.geometry import make_geometry

DTYPES = ["fp32", "tf32", "fp16", "bf16"]
CHANNELS = [1, 3, 8, 17, 27, 48, 100]


def strides(case_: Case) -> tuple[int, ...]:
    return tuple(a.stride for a in case_.geometry.axes)


def run_boxes(case_, x, dtype, block, parallel, run=call) -> torch.Tensor:
    """S by the box kernel alone."""
    rows = rows_of_channels(x, dtype)
    work = W.shift_work(case_.geometry, block, 32, parallel)
    workspace = poisoned(work)
    run("gram_box", **box_arguments(rows, strides(case_), work, dtype, workspace))
    return reduce(call, workspace, work, case_.geometry.samples)


def run_shift(case_, x, dtype, block, parallel, run=call, run_box=None) -> torch.Tensor:
    """S by the staged-halo kernel, with the box kernel for the strips."""
    rows = rows_of_channels(x, dtype)
    plan = shift_plan(case_.geometry, block, rows.itemsize, 32, parallel)
    workspace = poisoned(plan.work)
    run("gram_shift", **shift_arguments(rows, plan, dtype, workspace))
    box = box_arguments(rows, strides(case_), plan.work, dtype, workspace)
    (run_box or run)("gram_box", **box)
    return reduce(call, workspace, plan.work, case_.geometry.samples)


def unstrided(case_: Case) -> Case:
    return Case(
        case_.batch,
        case_.channels,
        case_.size,
        case_.kernel,
        (1,) * len(case_.size),
        case_.padding,
        case_.dilation,
        case_.groups,
    )


# --------------------------------------------------------------------------- box kernel


@pytest.mark.emulation
@settings(max_examples=25)
@given(
    case_=cases(max_channels=20),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([16, 32, 64, 128]),
    parallel=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_boxes(case_, dtype, block, parallel, seed):
    x = case_.input()
    check(run_boxes(case_, x, dtype, block, parallel, partial(call, seed=seed)), x, case_, dtype)


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_boxes_for_any_number_of_channels(channels, dtype):
    case_ = case(2, channels, (5, 9), (3, 2), stride=(1, 2), padding=1)
    x = case_.input()
    check(run_boxes(case_, x, dtype, 64, 10), x, case_, dtype)


@pytest.mark.emulation
def test_boxes_of_a_strided_input_leave_its_gaps_alone():
    case_ = case(2, 8, (4, 5), 3, padding=1)
    x = case_.input()
    wide = np.full((2, 1, 4, 7, 16), np.nan, np.float32)  # two pixels and 8 channels too many
    wide[:, :, :, :5, :8] = rows_of_channels(x, "fp32")
    work = W.shift_work(case_.geometry, 16, 32, 5)
    workspace = poisoned(work)
    arguments = box_arguments(wide, (1, 1), work, "fp32", workspace) | {"channels": 8}
    call("gram_box", **arguments)
    check(reduce(call, workspace, work, case_.geometry.samples), x, case_, "fp32")


# --------------------------------------------------------------------------- staged-halo kernel


@pytest.mark.emulation
@settings(max_examples=25)
@given(
    case_=cases(max_channels=20).map(unstrided).filter(lambda c: fits(c)),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([16, 32, 64]),
    parallel=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_shifts(case_, dtype, block, parallel, seed):
    x = case_.input()
    run = partial(call, seed=seed)
    check(run_shift(case_, x, dtype, block, parallel, run), x, case_, dtype)


def fits(case_: Case) -> bool:
    """Whether the kernel fits the image without the stride and some pixel is seen by a tap."""
    try:
        geometry = make_geometry(case_.shape, *case_.arguments)
    except RuntimeError:
        return False
    return bool(boxes.shift_program(geometry.axes).boxes)


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_shifts_for_any_number_of_channels(channels, dtype):
    case_ = case(2, channels, (6, 9), 3, padding=1)
    x = case_.input()
    check(run_shift(case_, x, dtype, 64, 10), x, case_, dtype)


@pytest.mark.emulation
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    "case_",
    [
        case(1, 5, (9, 8), 5, padding=2),  # 41 shifts: several sets
        case(2, 3, (4, 5, 6), 3, padding=1),  # 63
        case(1, 4, (300,), 3, padding=1, dilation=40),  # a halo of several chunks
        case(3, 4, (200,), 2),  # several chunks, hardly a halo
        case(9, 6, (3, 3), 3, padding=1),  # a chunk spans many images
        case(2, 40, (7, 7), 3, padding=1, groups=4),
        case(1, 3, (1, 1), 3, padding=1),
    ],
    ids=lambda c: f"{c.kernel}-{c.size}" if isinstance(c, Case) else None,
)
def test_shift_shapes(case_, block):
    x = case_.input()
    check(run_shift(case_, x, "bf16", block, 7), x, case_, "bf16")


@pytest.mark.emulation
def test_splits_and_schedules_agree_bit_for_bit():
    case_ = case(3, 20, (6, 7), 3, padding=1)
    x = case_.input()
    for parallel in (1, 8):
        results = {
            run_shift(case_, x, "bf16", 32, parallel, partial(call, seed=seed)).numpy().tobytes()
            for seed in range(20)
        }
        assert len(results) == 1
    results = {
        run_boxes(case_, x, "bf16", 32, 8, partial(call, seed=seed)).numpy().tobytes()
        for seed in range(20)
    }
    assert len(results) == 1


@pytest.mark.emulation
def test_every_barrier_and_wait_is_needed():
    case_ = case(2, 8, (200,), 3, padding=1)  # more chunks than stages
    rows = rows_of_channels(case_.input(), "bf16")
    plan = shift_plan(case_.geometry, 16, 2, 32, 1)
    waits = unneeded("gram_shift", **shift_arguments(rows, plan, "bf16", poisoned(plan.work)))
    assert not waits
    work = W.shift_work(case_.geometry, 16, 32, 1)
    waits = unneeded("gram_box", **box_arguments(rows, (1,), work, "bf16", poisoned(work)))
    assert not waits


@pytest.mark.emulation
@pytest.mark.parametrize("block", [16, 32, 64])
def test_rows_lie_in_different_banks(block):
    """ldmatrix takes one cycle a matrix, but for the rows of zeros and the ring's end."""
    case_ = case(1, block, (40,), 1)
    x = case_.input()
    rows = rows_of_channels(x, "bf16")
    plan = shift_plan(case_.geometry, block, 2, 32, 1)
    stats = call("gram_shift", **shift_arguments(rows, plan, "bf16", poisoned(plan.work)))
    assert stats["ldmatrix_phases"] > 0
    # past the 40th pixel every row is the row of zeros: no conflict among equal addresses
    assert stats["ldmatrix_conflicts"] == 0
    work = W.shift_work(case_.geometry, block, 32, 1)
    stats = call("gram_box", **box_arguments(rows, (1,), work, "bf16", poisoned(work)))
    assert stats["ldmatrix_phases"] > 0
    assert stats["ldmatrix_conflicts"] == 0


@pytest.mark.emulation
def test_pixels_are_read_once():
    """What the staged tile is for: 13 products of a range of pixels for one pass over it."""
    case_ = case(4, 32, (16, 16), 3, padding=1)
    rows = rows_of_channels(case_.input(), "bf16")
    plan = shift_plan(case_.geometry, 32, 2, 32, 1)
    assert len(plan.items) == 1
    assert sum(row[3] for row in plan.shifts) == 13
    stats = call("gram_shift", **shift_arguments(rows, plan, "bf16", poisoned(plan.work)))
    tables = 4 * (8 + 3 * 4 * 14 * 256 + 3 * 4 * 256 * 16)  # item, shifts, masks: generous
    assert 2 * rows.nbytes <= stats["global_read_bytes"] < 2 * rows.nbytes + tables


@pytest.mark.emulation
def test_an_infinite_border_pixel_stays_in_its_channel():
    """A border pixel meets the row of zeros: NaN may appear for its own channel, nowhere else."""
    case_ = case(1, 3, (6, 6), 3, padding=1)
    x = case_.input()
    x[0, 1, 0, 0] = torch.inf
    S = run_shift(case_, x, "fp32", 16, 3)[0].reshape(3, 9, 3, 9)
    assert S[::2, :, ::2].isfinite().all()
    assert not S[1, :, 1].isfinite().all()


@pytest.mark.emulation
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_plan_knows_the_shared_memory(block, itemsize):
    case_ = case(1, block, (9, 70), 3)
    dtype = "bf16" if itemsize == 2 else "fp32"
    plan = shift_plan(case_.geometry, block, itemsize, 32, 1)
    rows = rows_of_channels(case_.input(), dtype)
    arguments = shift_arguments(rows, plan, dtype, poisoned(plan.work))
    arrays = {k: 4096 for k, v in arguments.items() if isinstance(v, np.ndarray)}
    (launch,) = record("gram_shift", **{**arguments, **arrays})
    assert launch["shared_bytes"] == Shape(block, itemsize).shared_bytes(plan.halo)
    needed = launch["shared_bytes"]
    assert shift_plan(case_.geometry, block, itemsize, 32, 1, shared_limit=needed - 1) is None


def test_no_plan_for_strides_and_unseen_images():
    assert shift_plan(case(2, 3, (6, 6), 3, stride=(1, 2)).geometry, 16, 2, 32, 1) is None
    assert shift_plan(case(2, 3, (1,), 2, padding=3, dilation=4).geometry, 16, 2, 32, 1) is None


@pytest.mark.emulation
def test_bad_arguments_are_refused():
    case_ = case(1, 8, (6, 6), 3)
    rows = rows_of_channels(case_.input(), "bf16")
    plan = shift_plan(case_.geometry, 16, 2, 32, 1)
    good = shift_arguments(rows, plan, "bf16", poisoned(plan.work))
    call("gram_shift", **good)
    for bad in (
        {"block": 48},
        {"channels": 7},
        {"halo": 1 << 20},
        {"row_stride": 12},
        {"dtype": 9},
    ):
        with pytest.raises(LaunchError):
            call("gram_shift", **{**good, **bad})
    work = W.shift_work(case_.geometry, 16, 32, 1)
    good = box_arguments(rows, (1, 1), work, "bf16", poisoned(work))
    call("gram_box", **good)
    for bad in ({"block": 48}, {"channels": 7}, {"stride_n": 12}, {"dtype": 9}):
        with pytest.raises(LaunchError):
            call("gram_box", **{**good, **bad})
    empty = {"item_count": 0, "items": good["items"][:0]}
    assert call("gram_box", **{**good, **empty})["launches"] == 0


# --------------------------------------------------------------------------- compiled code

PTX = [
    (case(2, 19, (7, 5), 3, padding=1), 32),
    (case(1, 40, (5, 9), (2, 3), padding=(0, 1), dilation=2), 64),
    (case(2, 3, (3, 4, 3), 3, padding=1), 16),
]


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case_", "block"), PTX, ids=["2d", "dilated", "3d"])
def test_shifts_ptx(case_, block, dtype, arch):
    x = case_.input()
    for seed in range(2):
        run = partial(run_ptx, header="gram_shift.cuh", arch=arch, seed=seed)
        check(run_shift(case_, x, dtype, block, 3, run, call), x, case_, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_boxes_ptx(block, dtype, arch):
    case_ = case(3, 21, (9, 7), (2, 1), stride=(2, 1), padding=1)
    x = case_.input()
    for seed in range(2):
        run = partial(run_ptx, header="gram_box.cuh", arch=arch, seed=seed)
        check(run_boxes(case_, x, dtype, block, 4, run), x, case_, dtype)
