"""The second moment by implicit im2col, and of patches of one pixel."""

import pytest
import simulator
import torch
from helpers import DEVICE, LAYOUTS, case, cases, moment_error, rows, strided
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import reference
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import configs, precision_key
from dbp_kernels.backends.triton.gram_direct import KERNEL, choose, patch_gram_direct

pytestmark = pytest.mark.usefixtures("poison")

PRECISIONS = {"ieee": "highest", "tf32": "high"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGET = runtime.target(DEVICE) if DEVICE.type == "cuda" else 90
BOUND = 4e-6  # products are exact in float32, sums are not


@pytest.fixture(autouse=True)
def precision():
    """Sets the float32 matmul precision for one test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield lambda name: torch.set_float32_matmul_precision(PRECISIONS[name])
    torch.set_float32_matmul_precision(before)


def oracle(c, x):
    return reference.patch_gram(x.double(), *c.arguments)


def tf32(x):
    """Rounded to the nearest tf32 value, ties away from zero: in float64, by the definition."""
    mantissa, exponent = torch.frexp(x.double())
    ties = (mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign()
    return torch.ldexp(ties / 2**11, exponent)


@given(
    c=cases(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    parallel=st.sampled_from([1, 7, 30]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(c, dtype, layout, parallel, seed):
    x = c.input(dtype, seed, layout).to(DEVICE)
    S = patch_gram_direct(x, c.geometry, parallel=parallel)
    assert moment_error(S, oracle(c, x)) < BOUND
    assert torch.equal(S, S.mT)


CASES = [
    case(2, 3, (17, 15), 7, stride=2, padding=3),  # a first layer: D = 147
    case(2, 5, (9, 8), 3, padding=1),
    case(1, 14, (7, 6), 3, stride=2, padding=2, dilation=2),
    case(2, 20, (6, 5), 3, padding=1, groups=20),  # depthwise
    case(3, 12, (11,), 5, stride=2, padding=4, groups=6),
    case(2, 2, (4, 5, 6), (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
    case(2, 7, (5, 4), 1, padding=1),
]
PIXELS = [
    rows((150, 60)),
    rows((13, 5, 24), groups=3),
    case(2, 20, (5, 5), 1, stride=2),
    case(2, 9, (4, 3, 2), 1),
    case(1, 1, (1,), 1),
]


@pytest.mark.parametrize("c", CASES + PIXELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_64_bit_addresses_agree_bit_for_bit(c, dtype):
    for layout in ("contiguous", "channels_last"):
        x = strided(c.input(dtype), layout).to(DEVICE)
        S = patch_gram_direct(x, c.geometry, parallel=9)
        assert moment_error(S, oracle(c, x)) < BOUND
        assert torch.equal(S, patch_gram_direct(x, c.geometry, parallel=9))
        assert torch.equal(S, patch_gram_direct(x, c.geometry, parallel=9, index64=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_configuration(name, dtype, precision):
    precision(name)
    for c in (CASES[1], CASES[4]):
        x = c.input(dtype).to(DEVICE)
        exact = oracle(c, tf32(x) if name == "tf32" else x)
        for config in configs(KERNEL, precision_key(dtype), TARGET):
            S = patch_gram_direct(x, c.geometry, config)
            assert moment_error(S, exact) < BOUND, config.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    c = CASES[1]
    x = c.input(torch.float32, layout=layout).to(DEVICE)
    assert moment_error(patch_gram_direct(x, c.geometry), oracle(c, x)) < BOUND


def test_no_image_is_split_but_pixels_are():
    """One image with many pixels still gives every processor something to do."""
    c = case(1, 1, (40, 40), 3, padding=1)
    x = c.input(torch.float32).to(DEVICE)
    S = patch_gram_direct(x, c.geometry, parallel=8)
    assert moment_error(S, oracle(c, x)) < BOUND
    assert not torch.equal(S, patch_gram_direct(x, c.geometry, parallel=1))  # another order


@pytest.mark.parametrize("precision_name", ["bf16", "fp16", "tf32", "ieee"])
def test_small_groups_take_small_tiles(precision_name):
    assert choose(512, 9, precision_name, TARGET).block_m <= 32
    assert choose(1, 640, precision_name, TARGET).block_m == 64


# ---------------------------------------------------------------------------- compiled code


def gram_in_simulator(target, name, c, dtype, layout, seed, block):
    torch.set_float32_matmul_precision(PRECISIONS[name])
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    x = strided(c.input(dtype, seed), layout)
    shipped = configs(KERNEL, precision_key(dtype), target)
    config = next(k for k in shipped if k.block_m == block)
    with simulator.simulated(target, seed) as launched:
        S = patch_gram_direct(x, c.geometry, config)
    return x, S, launched


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_compiled_code(compiled, target, dtype, number):
    c = CASES[number]
    blocks = (64, 32, 16) if number in (1, 4) else (16 if c.groups > 1 else 64,)
    for seed, block in enumerate(blocks):
        name = "tf32" if (number + seed) % 2 else "ieee"
        layout = "channels_last" if (number + seed) % 3 == 1 else "contiguous"
        arguments = target, name, c, dtype, layout, seed, block
        x, S, launched = compiled(gram_in_simulator, *arguments)
        exact = oracle(c, tf32(x) if name == "tf32" else x)
        assert moment_error(S, exact) < BOUND, arguments
        assert launched == ["gram_direct_kernel", "reduce_kernel"]
