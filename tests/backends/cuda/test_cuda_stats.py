"""stats: decor_stats in one kernel, emulated and from compiled PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import DTYPES, LaunchError, call, decode, encode, run_ptx, unneeded
from helpers import LAYOUTS, Case, case, cases, error, rows, strided
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbp_kernels import reference

LIMIT = 128  # D


def triple(values, fill: int = 1) -> list[int]:
    return [fill] * (3 - len(values)) + list(values)


def prepare(case_: Case, dtype: str, layout: str = "contiguous", splits: int = 3):
    """(arguments, expected C and V in float64, the same in plain float32)"""
    geometry = case_.geometry
    x = strided(case_.input(), layout)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    array = encode(storage.numpy()[x.storage_offset() :], dtype)
    rounded = torch.from_numpy(decode(encode(x.contiguous().numpy(), dtype)))
    R = case_.R(torch.float32)
    expected = reference.decor_stats(rounded, R.double(), *case_.arguments)
    plain = reference.decor_stats(rounded.float(), R, *case_.arguments)
    groups, dim = geometry.groups, geometry.dim
    if case_.kernel:
        strides = x.stride(0), x.stride(1), triple(x.stride()[2:], 0)
        images = x.shape[0]
    else:  # rows: pixels without neighbours
        x = x.reshape(-1, x.shape[-1])
        strides = x.stride(0), x.stride(1), [0, 0, 0]
        images = x.shape[0]
    arguments = {
        "x": array,
        "r": R.numpy(),
        "workspace": np.full((groups, splits, dim, dim), np.nan, np.float32),
        "c": np.full((groups, dim, dim), np.nan, np.float32),
        "v": np.full((groups, dim), np.nan, np.float32),
        "dtype": DTYPES[dtype],
        "image_stride": strides[0],
        "channel_stride": strides[1],
        "pixel_stride": strides[2],
        "images": images,
        "size": triple([a.size for a in geometry.axes]),
        "output": triple(geometry.output_size),
        "kernel": triple(geometry.kernel_size),
        "stride": triple([a.stride for a in geometry.axes]),
        "padding": triple([a.padding for a in geometry.axes], 0),
        "dilation": triple([a.dilation for a in geometry.axes]),
        "groups": groups,
        "group_channels": geometry.group_channels,
        "splits": splits,
    }
    return arguments, expected, plain


def check(arguments: dict, expected, plain) -> None:
    C, V = torch.from_numpy(arguments["c"]), torch.from_numpy(arguments["v"])
    assert error(C, expected[0]) <= 2 * error(plain[0], expected[0]) + 1e-6
    assert error(V, expected[1]) <= 2 * error(plain[1], expected[1]) + 1e-6
    assert torch.equal(C, C.mT)
    assert (C.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.emulation
@given(
    case_=cases(),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    layout=st.sampled_from(LAYOUTS),
    splits=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 100),
)
def test_stats(case_, dtype, layout, splits, seed):
    assume(case_.geometry.dim <= LIMIT)
    arguments, *expected = prepare(case_, dtype, layout, splits)
    call("stats", seed=seed, **arguments)
    check(arguments, *expected)


@pytest.mark.emulation
@pytest.mark.parametrize(
    "case_",
    [
        case(2, 3, (7, 9), 3, padding=1),  # D = 27
        case(3, 3, (9, 9), 5, stride=2, padding=2),  # 75
        case(1, 128, (5, 4), 1),
        case(2, 12, (4, 5), 3, padding=1),  # 108
        case(2, 32, (4,), 2, groups=2),  # 32 twice
        rows((70, 100)),
        rows((3, 11, 48), groups=3),
        rows((1, 1)),
    ],
    ids=str,
)
def test_usual_sizes(case_):
    arguments, *expected = prepare(case_, "bf16")
    call("stats", **arguments)
    check(arguments, *expected)


@pytest.mark.emulation
def test_twenty_schedules_agree_bit_for_bit():
    results = set()
    for seed in range(20):
        arguments, *expected = prepare(case(2, 3, (7, 9), 3, padding=1), "fp32")
        call("stats", seed=seed, **arguments)
        check(arguments, *expected)
        results.add(arguments["c"].tobytes() + arguments["v"].tobytes())
    assert len(results) == 1


@pytest.mark.emulation
def test_every_barrier_is_needed():
    arguments, *_ = prepare(case(2, 3, (17, 19), 3, padding=1), "fp32")
    assert not unneeded("stats", **arguments)


@pytest.mark.emulation
def test_shared_memory_fits_every_target():
    arguments, *expected = prepare(case(1, 128, (3, 3), 1), "fp32")
    call("stats", shared_limit=99 * 1024, **arguments)
    check(arguments, *expected)


@pytest.mark.emulation
def test_no_samples():
    arguments, *_ = prepare(case(1, 3, (4, 4), 3), "fp32")
    arguments["images"] = 0
    call("stats", **arguments)
    assert (arguments["c"] == 0).all()
    assert (arguments["v"] == -1).all()


@pytest.mark.emulation
def test_unsupported_arguments_are_refused():
    arguments, *_ = prepare(case(1, 129, (4,), 1), "fp32")
    with pytest.raises(LaunchError):
        call("stats", **arguments)
    arguments, *_ = prepare(case(1, 3, (4, 4), 3), "fp32")
    for wrong in ({"splits": 0}, {"images": 1 << 40}, {"stride": [0, 1, 1]}, {"dtype": 7}):
        with pytest.raises(LaunchError):
            call("stats", **{**arguments, **wrong})


@pytest.mark.ptx
@settings(max_examples=6)
@given(
    case_=cases(max_batch=2),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    arch=st.sampled_from(["compute_80", "compute_90a"]),
    seed=st.integers(0, 100),
)
def test_stats_ptx(case_, dtype, arch, seed):
    assume(case_.geometry.dim <= LIMIT)
    arguments, *expected = prepare(case_, dtype, splits=2)
    run_ptx("stats", header="stats.cuh", arch=arch, seed=seed, **arguments)
    check(arguments, *expected)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
@pytest.mark.parametrize("channels", [3, 7, 11])
def test_stats_ptx_every_size(arch, channels):
    arguments, *expected = prepare(case(1, channels, (5, 6), 3, padding=1), "bf16", splits=2)
    run_ptx("stats", header="stats.cuh", arch=arch, **arguments)
    check(arguments, *expected)
