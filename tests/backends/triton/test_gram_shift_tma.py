"""The shift form on tensor descriptors against the float64 definition, interpreted and compiled."""

import itertools

import pytest
import simulator
import torch
from helpers import DEVICE, LAYOUTS, case, cases, moment_error
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import reference
from dbp_kernels.backends.triton import gram_shift_tma as tma
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import Config, configs
from dbp_kernels.planning.boxes import shift_program

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(
        DEVICE.type == "cuda" and runtime.target(DEVICE) < 90, reason="this GPU has no TMA"
    ),
]
DTYPES = [torch.float16, torch.bfloat16]
SMALL = Config(16, 16, 16, 4, 2)


def check(case_, x, S):
    """Products of 16-bit numbers are exact in float32, so only sums round."""
    oracle = reference.patch_gram(x.double(), *case_.arguments)
    assert moment_error(S.cpu(), oracle) < 1e-5
    assert torch.equal(S, S.mT)


@given(
    case_=cases(max_batch=20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    index64=st.booleans(),
)
def test_any_geometry(case_, dtype, layout, index64):
    x = case_.input(dtype, layout=layout)
    S = tma.patch_gram_shift_tma(x.to(DEVICE), case_.geometry, SMALL, 5, index64)
    check(case_, x, S)


def test_own_configuration():
    case_ = case(17, 40, (6, 5), 3, padding=1)
    x = case_.input(torch.bfloat16, layout="channels_last").to(DEVICE)
    assert tma.usable(x, case_.geometry)
    check(case_, x.cpu(), tma.patch_gram_shift_tma(x, case_.geometry))


def test_float32_is_left_to_pointers():
    case_ = case(1, 8, (4, 4), 3)
    assert not tma.usable(case_.input(torch.float32).to(DEVICE), case_.geometry)


@given(case_=cases(max_batch=4))
def test_rows_hold_every_pixel_a_tap_reads(case_):
    geometry = case_.geometry
    x = case_.input(torch.float16)
    rows = tma.pack_rows(x.to(DEVICE), geometry).cpu()
    layout = tma.layout(geometry)
    x = x.reshape(*x.shape[:2], *(1,) * (5 - x.dim()), *x.shape[2:])
    for z, y, w in itertools.product(*map(range, x.shape[2:])):
        phases = tuple(p % a.stride for p, a in zip((z, y, w), layout.axes))
        if phases in layout.phases:
            first = layout.row((z, y, w))
            pixel = rows[first : first + case_.batch, : case_.channels]
            assert torch.equal(pixel, x[:, :, z, y, w])


def test_tiles_are_as_large_as_channels_fill():
    blocks = [tma.choose(c, g, 90).block_m for c, g in ((512, 512), (64, 64), (96, 96), (256, 32))]
    assert blocks == [128, 64, 128, 64]


# --------------------------------------------------------------------------- compiled code

COMPILED = [
    (case(67, 70, (9,), 3, padding=1), case(30, 133, (7,), 2, dilation=2)),
    (
        case(23, 70, (5, 4), 2, padding=1),
        case(25, 36, (7, 9), (2, 3), stride=(1, 2), padding=1, groups=2),
    ),
]


def test_compiled_cases_have_tiles_and_tails():
    for (small, large), config in zip(COMPILED, configs("gram_shift_tma", "bf16", 90)):
        for case_ in (small, large):
            rows, block_k = tma.layout(case_.geometry), config.block_k
            boxes = shift_program(case_.geometry.axes).boxes
            runs = [tma._run_words(box, rows, block_k) for box in boxes]
            assert any(run[7] for run in runs)
            assert any(run[11] for run in runs)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("seed", range(2))
def test_compiled_code(compiled, dtype, number, seed):
    case_ = COMPILED[number][seed]
    x = case_.input(dtype, seed=seed)
    config = configs("gram_shift_tma", "bf16", 90)[number]
    check(case_, x, compiled(run_simulated, x, seed, case_.geometry, config, 5, seed == 1))


def run_simulated(x, seed, *arguments):
    with simulator.simulated(90, seed, race_check=False) as launched:  # it knows no mbarriers
        S = tma.patch_gram_shift_tma(x, *arguments)
    assert launched[-2:] == ["gram_shift_tma_kernel", "reduce_kernel"]
    return S
