"""update: the epilogue of the update rule, emulated and from compiled PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import call, run_ptx, unneeded
from helpers import error, random
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.rules import UpdateRule

CHUNK = 4096  # elements per block


def prepare(groups: int, dim: int, rule: str, kappa: float, guarded: bool = False):
    """(arguments, E and both sums of squares in float64); the middle of x has no variance."""
    weights = UpdateRule.make(rule, kappa, dim, guarded)
    m = random((groups, dim, dim), torch.float32)
    m = (m + m.mT).contiguous()
    m.diagonal(dim1=-2, dim2=-1)[:, dim // 2] = 0
    v = m.double().diagonal(dim1=-2, dim2=-1) - 1
    off = m.double() - torch.diag_embed(v + 1)
    stepped = v.masked_fill(v <= -1, 0) if guarded else v
    E = weights.c_weight * off + torch.diag_embed(weights.v_weight * stepped)
    sums = torch.stack([off.square().sum((1, 2)), v.square().sum(1)])
    array = m.numpy()
    arguments = {
        "m": array,
        "e": np.full((groups, dim, dim), np.nan, np.float32),
        "partials": np.full(2 * groups * -(-dim * dim // CHUNK), np.nan, np.float32),
        "sums": np.full((2, groups), np.nan, np.float32),
        "groups": groups,
        "dim": dim,
        "c_weight": weights.c_weight,
        "v_weight": weights.v_weight,
        "idle_weight": weights.idle_weight,
    }
    return arguments, (E, sums)


def check(arguments: dict, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    E, sums = expected
    assert error(torch.from_numpy(arguments["e"]), E) < 1e-6
    for found, exact in zip(torch.from_numpy(arguments["sums"]), sums):
        assert error(found, exact) < 1e-6


shapes = {
    "groups": st.integers(1, 3),
    "dim": st.integers(1, 100),
    "rule": st.sampled_from(["standard", "normalized"]),
    "kappa": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    "guarded": st.booleans(),
    "seed": st.integers(0, 100),
}


@pytest.mark.emulation
@given(**shapes)
def test_update(groups, dim, rule, kappa, guarded, seed):
    arguments, expected = prepare(groups, dim, rule, kappa, guarded)
    call("update", seed=seed, **arguments)
    check(arguments, expected)


@pytest.mark.emulation
def test_twenty_schedules_agree_bit_for_bit():
    results = set()
    for seed in range(20):
        arguments, expected = prepare(2, 91, "standard", 0.5)
        call("update", seed=seed, **arguments)
        check(arguments, expected)
        results.add(arguments["e"].tobytes() + arguments["sums"].tobytes())
    assert len(results) == 1


@pytest.mark.emulation
def test_every_barrier_is_needed():
    assert not unneeded("update", **prepare(2, 91, "standard", 0.5)[0])


@pytest.mark.emulation
def test_no_groups_and_no_elements():
    for groups, dim in ((0, 5), (2, 0)):
        arguments, _ = prepare(groups, max(dim, 1), "standard", 0.5)
        arguments |= {"groups": groups, "dim": dim}
        call("update", **arguments)
        if groups:
            assert (arguments["sums"] == 0).all()


@pytest.mark.ptx
@settings(max_examples=8)
@given(arch=st.sampled_from(["compute_80", "compute_90a"]), **shapes)
def test_update_ptx(arch, groups, dim, rule, kappa, guarded, seed):
    arguments, expected = prepare(groups, dim, rule, kappa, guarded)
    run_ptx("update", header="update.cuh", arch=arch, seed=seed, **arguments)
    check(arguments, expected)


@pytest.mark.ptx
def test_update_ptx_in_place():
    arguments, expected = prepare(1, 90, "standard", 0.5)
    arguments["e"] = arguments["m"]
    run_ptx("update", header="update.cuh", **arguments)
    check(arguments, expected)
