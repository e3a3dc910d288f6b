"""pack: every layout and dtype, emulated and from compiled PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import DTYPES, LaunchError, call, decode, encode, run_ptx, unneeded
from helpers import LAYOUTS, random, strided
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.backends.rows import padded

STORED = ["fp32", "fp16", "bf16"]
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def arrangement(t: torch.Tensor) -> tuple[list[int], list[int]]:
    """(size, stride) of image and three spatial dimensions of (N, C, *spatial)."""
    missing = 5 - t.dim()
    size = [t.shape[0], *(1,) * missing, *t.shape[2:]]
    stride = [t.stride(0), *(0,) * missing, *t.stride()[2:]]
    return size, stride


def prepare(x: torch.Tensor, source: str, target: str, demean: bool, last: str = "channels"):
    """The kernel's arguments for x (float64), and the expected output (float64).

    The array is what x's storage begins with; ``last`` orders the output's pixels: (N, *spatial, C)
    or (*spatial, N, C).
    """
    storage = torch.empty(0, dtype=torch.float64).set_(x.untyped_storage())
    array = encode(storage.numpy()[x.storage_offset() :], source)
    row = padded(x.shape[1], TORCH[target])
    if last == "channels":
        out = torch.full((x.shape[0], *x.shape[2:], row), torch.nan).movedim(-1, 1)
    else:
        out = torch.full((*x.shape[2:], x.shape[0], row), torch.nan).movedim((-1, -2), (1, 0))
    size, x_stride = arrangement(x)
    buffer = encode(np.full(out.numel(), np.nan), target)
    mean = encode(np.linspace(-1, 1, x.shape[1]), "fp32") if demean else None
    value = torch.from_numpy(decode(encode(x.contiguous().numpy(), source)))
    if demean:
        value = value - torch.from_numpy(decode(mean)).reshape(1, -1, *(1,) * (x.dim() - 2))
    expected = torch.zeros_like(out, dtype=torch.float64)
    expected[:, : x.shape[1]] = value
    arguments = {
        "x": array,
        "out": buffer,
        "mean": mean,
        "size": size,
        "x_stride": x_stride,
        "out_stride": arrangement(out)[1],
        "x_channel_stride": x.stride(1),
        "channels": x.shape[1],
        "row": row,
        "x_dtype": DTYPES[source],
        "out_dtype": DTYPES[target],
    }

    def result() -> torch.Tensor:
        return torch.from_numpy(decode(buffer)).as_strided(out.shape, out.stride())

    return arguments, result, expected


def check(result: torch.Tensor, expected: torch.Tensor, target: str) -> None:
    rounded = expected.float().to(TORCH[target])
    # the difference of two fp32 numbers is rounded once more before the target's rounding
    tolerance = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}[target]
    assert torch.allclose(result, rounded.double(), rtol=tolerance, atol=1e-6)


@pytest.mark.emulation
@given(
    shape=st.tuples(
        st.integers(1, 3),
        st.sampled_from([1, 3, 8, 27, 66]),
        *(st.integers(1, 5) for _ in range(3)),
    ),
    dims=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    source=st.sampled_from(STORED),
    target=st.sampled_from(STORED),
    demean=st.booleans(),
    last=st.sampled_from(["channels", "batch"]),
    seed=st.integers(0, 100),
)
def test_pack(shape, dims, layout, source, target, demean, last, seed):
    x = strided(random(shape[: 2 + dims]), layout)
    arguments, result, expected = prepare(x, source, target, demean, last)
    call("pack", seed=seed, **arguments)
    check(result(), expected, target)
    if not demean and source == target:
        assert torch.equal(result(), expected)


@pytest.mark.emulation
def test_lines_longer_than_a_tile_and_many_channels():
    x = random((2, 130, 9, 31))
    for layout in ("contiguous", "channels_last"):
        arguments, result, expected = prepare(strided(x, layout), "fp32", "bf16", False)
        call("pack", **arguments)
        check(result(), expected, "bf16")


@pytest.mark.emulation
def test_dimensions_that_are_one_run_are_merged():
    x = random((2, 16, 8, 8))
    arguments, _, _ = prepare(x, "fp32", "fp32", False)
    assert call("pack", **arguments)["blocks"] == 2  # 2 images of 64 pixels, not 16 rows of 8
    arguments, _, _ = prepare(strided(x, "channels_last"), "fp32", "fp32", False)
    assert call("pack", **arguments)["blocks"] == 2  # 128 pixels in one run


@pytest.mark.emulation
def test_twenty_schedules_agree_bit_for_bit():
    results = set()
    for seed in range(20):
        x = random((2, 27, 5, 14))
        arguments, result, expected = prepare(x, "fp32", "fp16", True)
        call("pack", seed=seed, **arguments)
        check(result(), expected, "fp16")
        results.add(arguments["out"].tobytes())
    assert len(results) == 1


@pytest.mark.emulation
def test_every_barrier_is_needed():
    assert not unneeded("pack", **prepare(random((2, 27, 5, 14)), "fp32", "fp16", False)[0])


@pytest.mark.emulation
def test_unsupported_arguments_are_refused():
    arguments, _, _ = prepare(random((2, 16, 8, 8)), "fp32", "bf16", False)
    for wrong in ({"row": 17}, {"row": 8}, {"out_stride": [1023, 0, 128, 16]}, {"x_dtype": 9}):
        with pytest.raises(LaunchError):
            call("pack", **{**arguments, **wrong})
    assert call("pack", **{**arguments, "size": [0, 1, 8, 8]})["launches"] == 0


@pytest.mark.ptx
@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 27, 66]), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    source=st.sampled_from(STORED),
    target=st.sampled_from(STORED),
    demean=st.booleans(),
    arch=st.sampled_from(["compute_80", "compute_90a"]),
    seed=st.integers(0, 100),
)
def test_pack_ptx(shape, layout, source, target, demean, arch, seed):
    arguments, result, expected = prepare(strided(random(shape), layout), source, target, demean)
    run_ptx("pack", header="pack.cuh", arch=arch, seed=seed, **arguments)
    check(result(), expected, target)
