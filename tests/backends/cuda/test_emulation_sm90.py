"""The stand-in for sm_90a: tensor copies, mbarriers and wgmma, right ones and broken ones."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import DTYPES, LaunchError, call, decode, encode, load, run_ptx, unneeded

SHAPES = [  # rows, columns of A and B, dtype, bytes of a swizzled row
    (64, 64, 64, "bf16", 128),
    (70, 40, 56, "bf16", 128),
    (200, 64, 128, "bf16", 128),
    (33, 64, 32, "bf16", 64),
    (129, 8, 64, "fp16", 128),
]


def prepare(rows, columns_a, columns_b, dtype, width, broken=0):
    """(arguments, A^T B in float64 with the zero columns TMA adds)"""
    rng = np.random.default_rng(rows)
    a = encode(rng.standard_normal((rows, columns_a)), dtype)
    b = encode(rng.standard_normal((rows, columns_b)), dtype)
    wide = -(-columns_b // 32) * 32
    expected = np.zeros((64, wide))
    expected[:columns_a, :columns_b] = decode(a).T @ decode(b)
    arguments = {
        "a": a,
        "b": b,
        "out": np.full((64, wide), np.nan, np.float32),
        "rows": rows,
        "columns_a": columns_a,
        "columns_b": columns_b,
        "dtype": DTYPES[dtype],
        "width": width,
        "broken": broken,
    }
    return arguments, expected


@pytest.mark.emulation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pipeline_of_tensor_copies_and_wgmma(shape):
    results = set()
    for seed in range(4):
        arguments, expected = prepare(*shape)
        stats = call("toy_sm90", seed=seed, **arguments)
        np.testing.assert_allclose(arguments["out"], expected, rtol=1e-5, atol=1e-4)
        assert stats["wgmma"] == 4 * 2 * -(-shape[0] // 32)
        results.add(arguments["out"].tobytes())
    assert len(results) == 1


@pytest.mark.emulation
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (1, "UninitialisedRead", "never written|before the copy"),
        (2, "RaceFault", "tensor copy to"),
        (3, "RaceFault", "which a wgmma may still read|tensor copy to"),
        (4, "DeadlockFault", "for ever"),
        (5, "Fault", "mbarrier"),
    ],
)
def test_broken_pipelines_are_caught(seed, broken, kind, message):
    arguments, _ = prepare(200, 64, 64, "bf16", 128, broken)
    with pytest.raises(getattr(load(), kind), match=message):
        call("toy_sm90", seed=seed, **arguments)


@pytest.mark.emulation
def test_accumulators_used_before_the_wait_are_nan():
    arguments, _ = prepare(32, 64, 64, "bf16", 128, broken=6)
    call("toy_sm90", **arguments)
    assert np.isnan(arguments["out"]).all()


@pytest.mark.emulation
def test_every_wait_is_needed():
    arguments, _ = prepare(200, 64, 64, "bf16", 128)
    assert not unneeded("toy_sm90", **arguments)


def by_hand():
    rng = np.random.default_rng(0)
    a, b = (encode(rng.standard_normal((16, n)), "bf16") for n in (64, 32))
    arguments = {"a": a, "b": b, "out": np.full((64, 32), np.nan, np.float32)}
    return arguments, decode(a).T @ decode(b)


@pytest.mark.emulation
def test_operands_written_by_threads():
    for seed in range(4):
        arguments, expected = by_hand()
        call("toy_by_hand", seed=seed, **arguments)
        np.testing.assert_allclose(arguments["out"], expected, rtol=1e-5, atol=1e-5)
    assert not unneeded("toy_by_hand", **arguments)  # the proxy fence and both named barriers


@pytest.mark.emulation
def test_tensor_maps_are_checked():
    arguments, _ = prepare(64, 64, 64, "bf16", 128)
    for wrong in ({"columns_a": 60}, {"width": 8}, {"a": arguments["a"].reshape(-1)[1:]}):
        with pytest.raises(LaunchError):
            call("toy_sm90", **{**arguments, **wrong})


@pytest.mark.ptx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wrappers_on_the_device(shape):
    """The device's half of sm90.cuh computes the same, from PTX (without race check: mbarriers)."""
    arguments, expected = prepare(*shape)
    run_ptx("toy_sm90", header="toy_sm90.cuh", arch="compute_90a", race_check=False, **arguments)
    np.testing.assert_allclose(arguments["out"], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.ptx
def test_operands_written_by_threads_on_the_device():
    arguments, expected = by_hand()
    run_ptx("toy_by_hand", header="toy_sm90.cuh", arch="compute_90a", race_check=False, **arguments)
    np.testing.assert_allclose(arguments["out"], expected, rtol=1e-5, atol=1e-5)
