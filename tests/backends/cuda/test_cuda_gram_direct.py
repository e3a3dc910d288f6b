"""Implicit im2col, and X^T X of a matrix by the box kernel: emulated, and from compiled PTX."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from emulation import LaunchError, call, encode, run_ptx, unneeded
from gram import box_arguments, check, direct_arguments, poisoned, reduce, rows_of_channels
from helpers import case, cases, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W

DTYPES = ["fp32", "tf32", "fp16", "bf16"]
LAYOUTS = ["contiguous", "channels_last", "reversed"]


def direct_work(geometry, block: int, parallel: int) -> W.Work:
    """One box whose pixels are the patches and whose channels are the columns of im2col."""
    program = boxes.direct_program(geometry.positions)
    columns = geometry.channels * geometry.taps
    return W.make_work(program, geometry.batch, columns, geometry.dim, block, 32, parallel)


def run_direct(case_, x, dtype, block, parallel, layout="contiguous", run=call) -> torch.Tensor:
    array = encode(x.numpy(), dtype)
    order = {
        "contiguous": range(array.ndim),
        "channels_last": [0, *range(2, array.ndim), 1],
        "reversed": range(array.ndim - 1, -1, -1),
    }[layout]
    array = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    work = direct_work(case_.geometry, block, parallel)
    workspace = poisoned(work)
    run("gram_direct", **direct_arguments(array, case_.geometry, work, dtype, workspace))
    return reduce(call, workspace, work, case_.geometry.samples)


def run_matrix(case_, x, dtype, block, parallel, run=call) -> torch.Tensor:
    """S of a 1x1 convolution or of rows: one box."""
    geometry = case_.geometry
    flat = x.reshape(-1, x.shape[-1]) if not case_.kernel else x.movedim(1, -1).flatten(0, -2)
    matrix = rows_of_channels(flat.T[None], dtype)  # (1, 1, 1, rows, C')
    program = boxes.direct_program(len(flat))
    work = W.make_work(program, 1, geometry.channels, geometry.group_channels, block, 32, parallel)
    workspace = poisoned(work)
    run("gram_box", **box_arguments(matrix, (), work, dtype, workspace))
    return reduce(call, workspace, work, geometry.samples)


@pytest.mark.emulation
@settings(max_examples=30)
@given(
    case_=cases(max_channels=4),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([16, 32, 64, 128]),
    parallel=st.integers(1, 20),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 100),
)
def test_direct(case_, dtype, block, parallel, layout, seed):
    x = case_.input()
    run = partial(call, seed=seed)
    check(run_direct(case_, x, dtype, block, parallel, layout, run), x, case_, dtype)


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 27])
def test_direct_of_an_image(channels, dtype):
    case_ = case(2, channels, (9, 11), (5, 3), stride=2, padding=2)
    x = case_.input()
    check(run_direct(case_, x, dtype, 64, 20), x, case_, dtype)


@pytest.mark.emulation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 27, 48, 100, 130])
def test_matrix(channels, dtype):
    for case_ in (
        case(3, channels, (5, 7), 1),
        rows((45, channels)),
    ):
        x = case_.input()
        check(run_matrix(case_, x, dtype, 128 if channels > 64 else 32, 6), x, case_, dtype)


@pytest.mark.emulation
def test_matrix_with_groups():
    case_ = case(2, 96, (9,), 1, groups=3)
    x = case_.input()
    check(run_matrix(case_, x, "bf16", 64, 6), x, case_, "bf16")


@pytest.mark.emulation
def test_only_the_upper_triangle_is_computed():
    work = W.make_work(boxes.direct_program(64), 1, 256, 256, 64, 32, 1)
    assert {(t.i, t.j) for t in work.items} == {(i, j) for i in range(4) for j in range(i, 4)}


@pytest.mark.emulation
def test_schedules_agree_bit_for_bit():
    case_ = case(2, 3, (8, 9), 3, padding=1)
    x = case_.input()
    pointwise = case(2, 40, (8, 9), 1)
    y = pointwise.input()
    for results in (
        {run_direct(case_, x, "bf16", 16, 9, run=partial(call, seed=s)) for s in range(20)},
        {run_matrix(pointwise, y, "fp16", 32, 9, partial(call, seed=s)) for s in range(20)},
    ):
        assert len({S.numpy().tobytes() for S in results}) == 1


@pytest.mark.emulation
def test_every_barrier_is_needed():
    case_ = case(2, 3, (9, 9), 3)
    work = direct_work(case_.geometry, 32, 1)
    x = encode(case_.input().numpy(), "bf16")
    assert not unneeded(
        "gram_direct", **direct_arguments(x, case_.geometry, work, "bf16", poisoned(work))
    )


@pytest.mark.emulation
def test_an_infinite_pixel_reaches_its_patches_only():
    case_ = case(1, 2, (5, 5), 3)
    x = case_.input()
    x[0, 1, 0, 0] = torch.inf  # seen by tap (0, 0) of the first patch only
    S = run_direct(case_, x, "fp32", 32, 2)[0]
    assert not S[9].isfinite().any()
    keep = [i for i in range(18) if i != 9]
    assert S[keep][:, keep].isfinite().all()


@pytest.mark.emulation
def test_bad_arguments_are_refused():
    case_ = case(1, 3, (6, 6), 3)
    work = direct_work(case_.geometry, 32, 1)
    x = encode(case_.input().numpy(), "bf16")
    good = direct_arguments(x, case_.geometry, work, "bf16", poisoned(work))
    call("gram_direct", **good)
    for bad in ({"block": 48}, {"output": [1, 0, 4]}, {"dtype": 9}):
        with pytest.raises(LaunchError):
            call("gram_direct", **{**good, **bad})


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_direct_ptx(block, dtype, arch):
    case_ = case(2, 3, (9, 7), (3, 2), stride=(2, 1), padding=1)
    x = case_.input()
    for seed, layout in enumerate(LAYOUTS):
        run = partial(run_ptx, header="gram_direct.cuh", arch=arch, seed=seed)
        check(run_direct(case_, x, dtype, block, 4, layout, run), x, case_, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_ptx(dtype, arch):
    case_ = rows((77, 91))
    x = case_.input()
    for seed in range(2):
        run = partial(run_ptx, header="gram_box.cuh", arch=arch, seed=seed)
        check(run_matrix(case_, x, dtype, 64, 4, run), x, case_, dtype)
