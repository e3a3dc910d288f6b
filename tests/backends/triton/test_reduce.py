"""The reduce kernel against the work list's own model, on workspaces of random numbers."""

import pytest
import simulator
import torch
from helpers import DEVICE, case, cases
from hypothesis import given
from hypothesis import strategies as st
from work_model import assembled

from dbp_kernels.backends.tables import make_tables
from dbp_kernels.backends.triton.reduce import reduction
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W

pytestmark = pytest.mark.usefixtures("poison")


def reduced(
    work: W.Work, parts: torch.Tensor, samples: int, index64: bool = False, device=DEVICE
) -> torch.Tensor:
    tables = make_tables(work, device)
    groups, dim = work.channels // work.group_channels, work.group_channels * work.program.taps
    out = torch.empty(groups, dim, dim, device=device)
    reduction(work, tables, samples, index64)(workspace=parts.to(device), out=out)
    return out.cpu()


def workspace(work: W.Work) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(work.slots, work.block, work.block, generator=generator)


@given(
    case_=cases(max_groups=2, max_channels=4),
    block=st.sampled_from([1, 2, 4]),
    items=st.sampled_from([1, 40]),
    index64=st.booleans(),
)
def test_reduce_equals_model(case_, block, items, index64):
    work = W.shift_work(case_.geometry, block, 1, items)
    parts = workspace(work)
    samples = case_.geometry.samples
    S = reduced(work, parts, samples, index64=index64)
    expected = assembled(parts.double(), work, samples)
    assert torch.allclose(S.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(S, S.mT)


@pytest.mark.parametrize("shape", [(70, 35), (64, 64), (33, 1)], ids=str)
def test_one_tap_over_several_squares(shape):
    channels, group_channels = shape
    work = W.make_work(boxes.direct_program(90), 1, channels, group_channels, 32, 4, 20)
    parts = workspace(work)
    S = reduced(work, parts, 90)
    assert torch.allclose(S.double(), assembled(parts.double(), work, 90), rtol=1e-5, atol=1e-6)


def test_only_listed_slots_are_read():
    work = W.shift_work(case(2, 5, (6, 4), 3, stride=2, padding=1).geometry, 4, 2, 20)
    parts = workspace(work)
    # below the diagonal of the symmetric boxes' tiles, and channels that do not exist
    below = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    for u, (i, j) in enumerate(work.upper):
        start = work.symmetric_base + u * work.symmetric
        if i == j:
            parts[start : start + work.symmetric, below] = torch.nan
    for p, (i, j) in enumerate(work.pairs):
        rows = slice(p * work.straight, (p + 1) * work.straight)
        if i == 1:
            parts[rows, 1:, :] = torch.nan
        if j == 1:
            parts[rows, :, 1:] = torch.nan
    assert reduced(work, parts, 12).isfinite().all()


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("index64", [False, True])
@pytest.mark.parametrize("shape", [(70, 35, 32), (33, 1, 16), (20, 20, 64)], ids=str)
def test_compiled_code_of_one_tap(compiled, target, index64, shape):
    """More taps are simulated with the kernels that fill the workspace."""
    expected, S = compiled(reduced_in_simulator, target, index64, *shape)
    assert torch.allclose(S.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(S, S.mT)


def reduced_in_simulator(target, index64, channels, group_channels, block):
    work = W.make_work(boxes.direct_program(90), 1, channels, group_channels, block, 4, 20)
    parts = workspace(work)
    with simulator.simulated(target, seed=channels):
        S = reduced(work, parts, 90, index64, torch.device("cpu"))
    return assembled(parts.double(), work, 90), S
