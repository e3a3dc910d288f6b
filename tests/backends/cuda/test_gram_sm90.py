"""The sm_90a kernels (TMA and wgmma): emulated, and from compiled PTX."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from emulation import DTYPES as NUMBERS
from emulation import LaunchError, call, record, run_ptx, unneeded
from gram import box_arguments, check, poisoned, reduce, rows_of_channels, shift_arguments
from helpers import Case, case, cases, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.backends.cuda.shift_plan import Sm90Shape, shift_plan
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W

DTYPES = ["fp16", "bf16"]
LIMIT = 227 << 10


def make_plan(case_: Case, parallel: int):
    return shift_plan(case_.geometry, 64, 2, 32, parallel, shared_limit=LIMIT, sm90=True)


def run_shift(case_, x, dtype, parallel, run=call) -> torch.Tensor:
    """S by the staged-halo kernel, with the box kernel for the strips."""
    packed = rows_of_channels(x, dtype)
    plan = make_plan(case_, parallel)
    workspace = poisoned(plan.work)
    run("gram_shift_sm90", **shift_arguments(packed, plan, dtype, workspace))
    steps = (1,) * len(case_.size)
    call("gram_box", **box_arguments(packed, steps, plan.work, dtype, workspace))
    return reduce(call, workspace, plan.work, case_.geometry.samples)


def matrix_arguments(matrix: np.ndarray, work: W.Work, dtype: str, workspace: np.ndarray) -> dict:
    return {
        "x": matrix,
        "workspace": workspace,
        "items": make_tables(work, torch.device("cpu")).items.numpy(),
        "rows": matrix.shape[-2],
        "row_stride": matrix.shape[-1],
        "channels": matrix.shape[-1],
        "item_count": len(work.items),
        "dtype": NUMBERS[dtype],
        "slots": work.slots,
    }


def matrix_work(case_: Case, parallel: int) -> W.Work:
    geometry = case_.geometry
    program = boxes.direct_program(geometry.samples)
    return W.make_work(program, 1, geometry.channels, geometry.group_channels, 128, 64, parallel)


def run_matrix(case_, x, dtype, parallel, run=call) -> torch.Tensor:
    """S of rows."""
    matrix = rows_of_channels(x.reshape(-1, x.shape[-1]).T[None], dtype)
    work = matrix_work(case_, parallel)
    workspace = poisoned(work)
    run("gram_matrix_sm90", **matrix_arguments(matrix, work, dtype, workspace))
    return reduce(call, workspace, work, case_.geometry.samples)


def unstrided(case_: Case) -> bool:
    return set(case_.stride) == {1} and bool(boxes.shift_program(case_.geometry.axes).boxes)


# --------------------------------------------------------------------------- shift form


@pytest.mark.emulation
@settings(max_examples=8)
@given(
    case_=cases(max_channels=30).filter(unstrided),
    dtype=st.sampled_from(DTYPES),
    parallel=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_shifts(case_, dtype, parallel, seed):
    x = case_.input()
    check(run_shift(case_, x, dtype, parallel, partial(call, seed=seed)), x, case_, dtype)


@pytest.mark.emulation
@pytest.mark.parametrize(
    "case_",
    [
        case(2, 3, (6, 9), 3, padding=1),
        case(2, 100, (6, 9), 3, padding=1),  # two tiles of channels
        case(1, 136, (4, 5), (1, 2)),
        case(1, 5, (9, 8), 5, padding=2),  # 41 shifts: several sets
        case(1, 4, (300,), 3, padding=1, dilation=40),  # a halo of several tiles
        case(3, 4, (500,), 2),  # more tiles than stages
        case(9, 6, (3, 3), 3, padding=1),  # a tile spans many images
        case(2, 40, (7, 7), 3, padding=1, groups=4),
        case(1, 3, (1, 1), 3, padding=1),
    ],
    ids=lambda c: f"{c.channels}-{c.kernel}-{c.size}",
)
@pytest.mark.parametrize("parallel", [1, 8])
def test_shift_shapes(case_, parallel):
    x = case_.input()
    check(run_shift(case_, x, "bf16", parallel), x, case_, "bf16")


@pytest.mark.emulation
def test_schedules_agree_bit_for_bit():
    case_ = case(3, 20, (6, 7), 3, padding=1)
    x = case_.input()
    matrix = rows((200, 150))
    y = matrix.input()
    for results in (
        {run_shift(case_, x, "bf16", 4, partial(call, seed=s)) for s in range(20)},
        {run_matrix(matrix, y, "fp16", 6, partial(call, seed=s)) for s in range(20)},
    ):
        assert len({S.numpy().tobytes() for S in results}) == 1


@pytest.mark.emulation
def test_every_barrier_and_wait_is_needed():
    case_ = case(1, 100, (400,), 2)  # more tiles than stages, and two tiles of channels
    packed = rows_of_channels(case_.input(), "bf16")
    plan = make_plan(case_, 1)
    arguments = shift_arguments(packed, plan, "bf16", poisoned(plan.work))
    assert not unneeded("gram_shift_sm90", **arguments)
    matrix = rows((400, 140))
    work = matrix_work(matrix, 1)
    packed = rows_of_channels(matrix.input().T[None], "bf16")
    arguments = matrix_arguments(packed, work, "bf16", poisoned(work))
    assert not unneeded("gram_matrix_sm90", **arguments)


@pytest.mark.emulation
def test_rows_lie_in_different_banks():
    case_ = case(1, 64, (64,), 1)
    packed = rows_of_channels(case_.input(), "bf16")
    plan = make_plan(case_, 1)
    stats = call("gram_shift_sm90", **shift_arguments(packed, plan, "bf16", poisoned(plan.work)))
    assert stats["ldmatrix_phases"] > 0
    assert stats["ldmatrix_conflicts"] == 0


@pytest.mark.emulation
def test_the_plan_knows_the_shared_memory():
    case_ = case(1, 64, (9, 70), 3)
    plan = make_plan(case_, 1)
    packed = rows_of_channels(case_.input(), "bf16")
    arguments = shift_arguments(packed, plan, "bf16", poisoned(plan.work))
    arrays = {k: 4096 for k, v in arguments.items() if isinstance(v, np.ndarray)}
    (launch,) = record("gram_shift_sm90", **{**arguments, **arrays})
    assert launch["shared_bytes"] == Sm90Shape().shared_bytes(plan.halo)


def test_no_plan_for_other_tiles():
    geometry = case(1, 8, (6,), 3).geometry
    assert shift_plan(geometry, 64, 2, 32, 1, sm90=True) is not None
    assert shift_plan(geometry, 32, 2, 32, 1, sm90=True) is None
    assert shift_plan(geometry, 64, 4, 32, 1, sm90=True) is None


@pytest.mark.emulation
def test_bad_arguments_are_refused():
    case_ = case(1, 8, (6, 6), 3)
    packed = rows_of_channels(case_.input(), "bf16")
    plan = make_plan(case_, 1)
    good = shift_arguments(packed, plan, "bf16", poisoned(plan.work))
    call("gram_shift_sm90", **good)
    for bad in (
        {"block": 32},
        {"channels": 7},
        {"halo": 1 << 20},
        {"row_stride": 12},
        {"dtype": 0},
    ):
        with pytest.raises(LaunchError):
            call("gram_shift_sm90", **{**good, **bad})
    matrix = rows((70, 24))
    work = matrix_work(matrix, 1)
    packed = rows_of_channels(matrix.input().T[None], "bf16")
    good = matrix_arguments(packed, work, "bf16", poisoned(work))
    call("gram_matrix_sm90", **good)
    for bad in ({"channels": 7}, {"row_stride": 12}, {"dtype": 1}):
        with pytest.raises(LaunchError):
            call("gram_matrix_sm90", **{**good, **bad})


# --------------------------------------------------------------------------- matrix


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (77, 27), (64, 128), (300, 100), (500, 200), (130, 300)])
def test_matrix(shape, dtype):
    case_ = rows(shape)
    x = case_.input()
    for parallel in (1, 9):
        check(run_matrix(case_, x, dtype, parallel), x, case_, dtype)


# --------------------------------------------------------------------------- compiled code


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case_",
    [
        case(2, 19, (7, 5), 3, padding=1),
        case(1, 70, (5, 9), (2, 3), padding=(0, 1), dilation=2),
        case(1, 3, (400,), 2),
    ],
    ids=lambda c: f"{c.channels}-{c.kernel}-{c.size}",
)
def test_shifts_ptx(case_, dtype):
    x = case_.input()
    for seed in range(3):
        run = partial(
            run_ptx, header="gram_shift_sm90.cuh", arch="compute_90a", seed=seed, race_check=False
        )
        check(run_shift(case_, x, dtype, 3, run), x, case_, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(77, 91), (400, 140)])
def test_matrix_ptx(shape, dtype):
    case_ = rows(shape)
    x = case_.input()
    for seed in range(3):
        run = partial(
            run_ptx, header="gram_matrix_sm90.cuh", arch="compute_90a", seed=seed, race_check=False
        )
        check(run_matrix(case_, x, dtype, 3, run), x, case_, dtype)
