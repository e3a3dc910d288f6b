"""The CPU stand-in for a GPU computes what a GPU computes, and catches what it is there to catch."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import DTYPES, bf16, call, decode, encode, from_bf16, load, run_ptx, unneeded

pytestmark = pytest.mark.emulation

SEEDS = range(20)


@pytest.fixture(scope="module")
def fault():
    return load()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def nans(*shape) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


# --- Right results --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_reversal(seed):
    x, out = rng().standard_normal(256).astype(np.float32), nans(256)
    stats = call("toy_reverse", seed=seed, x=x, out=out, n=256, barrier=1)
    np.testing.assert_array_equal(out, x[::-1])
    assert stats["barriers"] == 1
    assert stats["global_read_bytes"] == stats["global_write_bytes"] == 1024


@pytest.mark.parametrize("seed", range(5))
def test_stencil_over_blocks(seed):
    x, out = rng().standard_normal(202).astype(np.float32), nans(200)
    stats = call("toy_stencil", seed=seed, x=x, out=out, n=200, halo=2)
    np.testing.assert_array_equal(out, x[:-2] + x[1:-1] + x[2:])
    assert stats["blocks"] == 4


@pytest.mark.parametrize("seed", range(5))
def test_pipelined_copy(seed):
    x, out = rng().standard_normal((5, 64, 4)).astype(np.float32), nans(5, 64)
    call("toy_pipeline", seed=seed, x=x, out=out, tiles=5, broken=0)
    rows = np.roll(x, -1, axis=1)
    expected = rows[..., 0] + rows[..., 1] + rows[..., 2] + rows[..., 3]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_tensor_core_product(dtype, transposed):
    a, b = rng(1).standard_normal((16, 16)), rng(2).standard_normal((16, 8))
    a, b, out = encode(a, dtype), encode(b, dtype), nans(16, 8)
    stored = np.ascontiguousarray(a.T) if transposed else a
    stats = call("toy_product", a=stored, b=b, out=out, transposed=transposed, dtype=DTYPES[dtype])
    np.testing.assert_allclose(out, decode(a) @ decode(b), rtol=1e-6, atol=1e-6)
    # rows of 32 bytes: 8 of them meet every bank group twice; of 16 bytes: all different
    assert (stats["mma"], stats["ldmatrix_phases"], stats["ldmatrix_conflicts"]) == (1, 6, 4)


def test_tf32_product():
    a, b = rng(1).standard_normal((16, 8)), rng(2).standard_normal((8, 8))
    a, b, out = encode(a, "tf32"), encode(b, "tf32"), nans(16, 8)
    call("toy_product", a=a, b=b, out=out, transposed=0, dtype=DTYPES["tf32"])

    def tf32(x):  # nearest, ties away
        return ((x.view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32).astype(float)

    np.testing.assert_allclose(out, tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)
    assert np.abs(out - a.astype(float) @ b.astype(float)).max() > 1e-5  # it is not fp32


def special_floats() -> np.ndarray:
    bits = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)].astype(np.float64)
    ties = (finite[:-1] + finite[1:]) / 2  # between neighbours
    return np.concatenate([bits.view(np.float32), halves, ties.astype(np.float32)])


def test_conversions_round_to_nearest_even():
    import torch

    x = special_floats()
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = np.empty(x.shape, np.uint16 if dtype == "bf16" else np.float16)
        call("toy_convert", x=x, out=out, n=x.size, dtype=DTYPES[dtype])
        expected = torch.from_numpy(x).to(kind).double().numpy()
        np.testing.assert_array_equal(decode(out), expected)
    finite = x[np.isfinite(x)]
    np.testing.assert_array_equal(
        from_bf16(bf16(finite)), torch.from_numpy(finite).bfloat16().float().numpy()
    )


def test_shuffles():
    x, out = rng().standard_normal(32).astype(np.float32), nans(32)
    call("toy_shuffle", x=x, out=out)
    below = np.minimum(np.arange(32) + 1, 31)
    np.testing.assert_allclose(out, x.sum() + 3 + below, rtol=1e-5)


def test_schedules_differ_but_results_do_not():
    x = rng().standard_normal((5, 64, 4)).astype(np.float32)
    results, switches = set(), set()
    for seed in SEEDS:
        out = nans(5, 64)
        switches.add(call("toy_pipeline", seed=seed, x=x, out=out, tiles=5, broken=0)["switches"])
        results.add(out.tobytes())
    assert len(results) == 1
    assert len(switches) > 5


def test_barriers_and_waits_can_be_left_out(fault):
    x, out = rng().standard_normal((5, 64, 4)).astype(np.float32), nans(5, 64)
    arguments = {"x": x, "out": out, "tiles": 5, "broken": 0}
    sites = call("toy_pipeline", **arguments)["sites"]
    assert len(sites) == 4  # wait, barrier, barrier, and the last wait, for empty groups
    assert unneeded("toy_pipeline", **arguments) == sites[3:]


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["compute_80", "compute_90a"])
def test_the_device_computes_the_same(arch):
    """The wrappers' two halves: one source, emulated and from PTX, bit for bit."""
    x = special_floats()[::50]
    x = x[~np.isnan(x)]  # which NaN is nobody's business
    a, b = rng(1).standard_normal((16, 16)), rng(2).standard_normal((16, 8))
    calls = [
        ("toy_reverse", {"x": x[:256], "out": nans(256), "n": 256, "barrier": 1}),
        (
            "toy_pipeline",
            {
                "x": rng().random((5, 64, 4), np.float32),
                "out": nans(5, 64),
                "tiles": 5,
                "broken": 0,
            },
        ),
        ("toy_shuffle", {"x": rng().random(32, np.float32), "out": nans(32)}),
    ]
    for dtype in ("fp16", "bf16"):
        out = np.zeros(x.shape, np.uint16 if dtype == "bf16" else np.float16)
        calls.append(("toy_convert", {"x": x, "out": out, "n": x.size, "dtype": DTYPES[dtype]}))
    for dtype in ("tf32", "fp16", "bf16"):
        for transposed in (0, 1):
            operands = {"a": encode(a, dtype), "b": encode(b, dtype), "out": nans(16, 8)}
            calls.append(
                ("toy_product", {**operands, "transposed": transposed, "dtype": DTYPES[dtype]})
            )
    for kernel, arguments in calls:
        other = {**arguments, "out": arguments["out"].copy()}
        call(kernel, **arguments)
        run_ptx(kernel, header="toy_kernels.cuh", arch=arch, **other)
        np.testing.assert_array_equal(
            arguments["out"].view(np.uint8), other["out"].view(np.uint8), kernel
        )


# --- Broken kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier_is_caught(fault, seed):
    x, out = rng().standard_normal(256).astype(np.float32), nans(256)
    with pytest.raises((fault.UninitialisedRead, fault.RaceFault), match="reverse_kernel"):
        call("toy_reverse", seed=seed, x=x, out=out, n=256, barrier=0)


@pytest.mark.parametrize("seed", range(5))
def test_short_halo_is_caught(fault, seed):
    x, out = rng().standard_normal(202).astype(np.float32), nans(200)
    with pytest.raises(fault.UninitialisedRead, match="never written"):
        call("toy_stencil", seed=seed, x=x, out=out, n=200, halo=1)


def test_halo_past_the_input_is_caught(fault):
    x, out = rng().standard_normal(201).astype(np.float32), nans(200)
    with pytest.raises(fault.MemoryFault, match=r"byte 804 of 'x', which has 804"):
        call("toy_stencil", x=x, out=out, n=200, halo=2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("broken", [1, 2, 3, 4])
def test_broken_pipelines_are_caught(fault, seed, broken):
    x, out = rng().standard_normal((5, 64, 4)).astype(np.float32), nans(5, 64)
    kinds = fault.UninitialisedRead if broken < 3 else (fault.UninitialisedRead, fault.RaceFault)
    with pytest.raises(kinds, match="pipeline_kernel"):
        call("toy_pipeline", seed=seed, x=x, out=out, tiles=5, broken=broken)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (0, "MemoryFault", "read of 4 bytes out of bounds: byte 256 of 'x', which has 256"),
        (1, "MemoryFault", "write of 4 bytes out of bounds: byte -4 of 'out'"),
        (2, "MemoryFault", "byte 128 of an array of 128 bytes at shared byte 0"),
        (3, "MemoryFault", "misaligned global read of 16 bytes"),
        (4, "RaceFault", "of 'out', which another block"),
        (5, "DeadlockFault", "lanes of the warp"),
        (6, "DeadlockFault", "only 16 lanes|has exited"),
        (7, "MemoryFault", "byte 256 of an array of 256 bytes"),
    ],
)
def test_mistakes_are_caught_and_named(fault, what, kind, message):
    x, out = rng().standard_normal(64).astype(np.float32), nans(32)
    # 32 reads from p.n - 31 end one element past x
    with pytest.raises(getattr(fault, kind), match=message) as caught:
        call("toy_mistake", x=x, out=out, n=64, what=what)
    assert "mistake_kernel" in str(caught.value)
    assert "block (" in str(caught.value)


def test_arguments_are_checked():
    x, out = nans(32), nans(32)
    with pytest.raises(ValueError, match="no such kernel"):
        call("toy_unknown")
    with pytest.raises(ValueError, match="out: missing"):
        call("toy_shuffle", x=x)
    with pytest.raises(ValueError, match="extra: the kernel has no such argument"):
        call("toy_shuffle", x=x, out=out, extra=1)
    with pytest.raises(ValueError, match="x: expected an array of another dtype"):
        call("toy_shuffle", x=x.astype(np.float64), out=out)
    with pytest.raises(ValueError, match="C-contiguous"):
        call("toy_shuffle", x=nans(64)[::2], out=out)
    with pytest.raises(ValueError, match="n: does not fit"):
        call("toy_convert", x=x, out=out, n=1 << 40, dtype=0)
