"""reduce: partial tiles to S by the tables of work.py, emulated and from compiled PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import call, run_ptx, unneeded
from helpers import case, cases, error, moment_error
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels import reference
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W


def partials(x: torch.Tensor, work: W.Work, strides: tuple[int, ...]) -> torch.Tensor:
    """(slots, block, block): the products of every item; NaN where none writes."""
    block = work.block
    x = x.reshape(*x.shape[:2], *(1,) * (5 - x.dim()), *x.shape[2:]).movedim(1, -1)
    padded = torch.nn.functional.pad(x, (0, -work.channels % block))
    out = torch.full((work.slots, block, block), torch.nan, dtype=x.dtype)
    for item in work.items:
        box = work.program.boxes[item.box]
        p, left = torch.arange(item.first, item.last), []
        for start, size, step in reversed(list(zip(box.start, box.size, strides))):
            left.insert(0, start + step * (p % size))
            p = p // size
        right = [c + d for c, d in zip(left, box.offset)]
        X = padded[p, left[0], left[1], left[2], item.i * block : (item.i + 1) * block]
        Y = padded[p, right[0], right[1], right[2], item.j * block : (item.j + 1) * block]
        tile = X.T @ Y
        if box.symmetric and item.i == item.j:  # below the diagonal nobody may look
            tile[torch.ones_like(tile, dtype=torch.bool).tril(-1)] = torch.nan
        out[item.slot] = tile
    return out


def arguments_of(work: W.Work, workspace: torch.Tensor, samples: int) -> dict:
    """The kernel's arguments, its output poisoned."""
    tables = make_tables(work, torch.device("cpu"))
    dim = work.group_channels * work.program.taps
    return {
        "workspace": workspace.float().numpy(),
        "out": np.full((work.channels // work.group_channels, dim, dim), np.nan, np.float32),
        "tiles": tables.tiles.numpy(),
        "taps": tables.taps.numpy(),
        "slots": tables.slots.numpy(),
        "upper": len(work.upper),
        "channels": work.channels,
        "group_channels": work.group_channels,
        "tap_count": work.program.taps,
        "block": work.block,
        "straight": work.straight,
        "symmetric": work.symmetric,
        "symmetric_base": work.symmetric_base,
        "entries": work.entries,
        "scale": 1 / samples,
    }


def prepare(case_, block: int, parallel: int):
    """(arguments, S in float64)"""
    geometry = case_.geometry
    work = W.shift_work(geometry, block, 2, parallel)
    x = case_.input()
    strides = (*(1,) * (boxes.AXES - len(geometry.axes)), *(a.stride for a in geometry.axes))
    arguments = arguments_of(work, partials(x, work, strides), geometry.samples)
    return arguments, reference.patch_gram(x, *case_.arguments)


def check(arguments: dict, oracle: torch.Tensor) -> None:
    S = torch.from_numpy(arguments["out"])
    assert moment_error(S, oracle) < 1e-5
    assert torch.equal(S, S.mT)


@pytest.mark.emulation
@given(
    case_=cases(max_channels=5),
    block=st.sampled_from([1, 4, 16]),
    parallel=st.sampled_from([1, 40]),
    seed=st.integers(0, 100),
)
def test_reduce(case_, block, parallel, seed):
    arguments, oracle = prepare(case_, block, parallel)
    call("reduce", seed=seed, **arguments)
    check(arguments, oracle)


@pytest.mark.emulation
@pytest.mark.parametrize("block", [16, 32])
def test_matrix_times_itself(block):
    X = torch.randn(37, 100, dtype=torch.float64)
    work = W.make_work(boxes.direct_program(37), 1, 100, 50, block, 4, 20)
    arguments = arguments_of(work, partials(X.T.reshape(1, 100, 37), work, (1, 1, 1)), 37)
    call("reduce", **arguments)
    Z = X.reshape(37, 2, 50).transpose(0, 1)
    assert error(torch.from_numpy(arguments["out"]), Z.mT @ Z / 37) < 1e-6


@pytest.mark.emulation
def test_twenty_schedules_agree_bit_for_bit():
    arguments, oracle = prepare(case(2, 10, (5, 4), (3, 2), padding=1), 4, 20)
    results = set()
    for seed in range(20):
        arguments["out"].fill(np.nan)
        call("reduce", seed=seed, **arguments)
        check(arguments, oracle)
        results.add(arguments["out"].tobytes())
    assert len(results) == 1


@pytest.mark.emulation
def test_every_barrier_is_needed():
    arguments, _ = prepare(case(2, 10, (5, 4), (3, 2), padding=1), 4, 20)
    assert not unneeded("reduce", **arguments)


@pytest.mark.ptx
@settings(max_examples=8)
@given(
    case_=cases(dims=(1, 2), max_channels=3, max_batch=2),
    block=st.sampled_from([4, 16]),
    arch=st.sampled_from(["compute_80", "compute_90a"]),
    seed=st.integers(0, 100),
)
def test_reduce_ptx(case_, block, arch, seed):
    arguments, oracle = prepare(case_, block, 10)
    run_ptx("reduce", header="reduce.cuh", arch=arch, seed=seed, **arguments)
    check(arguments, oracle)
