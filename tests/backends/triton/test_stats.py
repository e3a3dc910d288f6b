"""C, V and the loss in one pass over the input."""

import pytest
import simulator
import torch
from helpers import DEVICE, LAYOUTS, case, cases, rows, strided
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import reference, rules
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import configs
from dbp_kernels.backends.triton.stats import KERNEL, choose_config, decor_stats, fits

pytestmark = pytest.mark.usefixtures("poison")

PRECISIONS = {"ieee": "highest", "tf32": "high"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGET = runtime.target(DEVICE) if DEVICE.type == "cuda" else 90


@pytest.fixture(autouse=True)
def precision():
    """Sets the float32 matmul precision for one test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield lambda name: torch.set_float32_matmul_precision(PRECISIONS[name])
    torch.set_float32_matmul_precision(before)


def matrix(c, seed=1):
    return c.R(torch.float32, seed).to(DEVICE)


def check(c, x, R, result, rule=None, bound=4e-6):
    """Against the definitions in float64, every number against what it is a difference of."""
    C, V, loss = result
    exact_C, exact_V = reference.decor_stats(x.double(), R.double(), *c.arguments)
    size = (exact_V + 1).abs().max()  # of the second moments that C and V are made of
    if size > 0:
        assert ((C - exact_C).abs().max() / size).nan_to_num(nan=1e9) < bound
    size = size.clamp(min=1)  # V = size - 1
    assert ((V - exact_V).abs().max() / size).nan_to_num(nan=1e9) < bound
    rule = rule or rules.UpdateRule.make("standard", 0.5, c.geometry.dim)
    terms = rule.c_weight * exact_C.square().sum((1, 2)) + rule.kappa * exact_V.square().sum(1)
    assert loss.shape == (c.groups,)
    scale = size**2 * c.geometry.dim**2 / rule.loss_scale
    assert ((loss - terms / rule.loss_scale).abs().max() / scale).nan_to_num(nan=1e9) < bound
    assert torch.equal(C, C.mT)
    assert (C.diagonal(dim1=1, dim2=2) == 0).all()


@given(
    c=cases(),
    dtype=st.sampled_from(DTYPES),
    kappa=st.sampled_from([0.0, 0.3, 1.0]),
    rule=st.sampled_from(rules.RULES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(c, dtype, kappa, rule, layout, seed):
    if not fits(c.geometry, TARGET, "ieee"):
        return
    x, R = c.input(dtype, seed, layout).to(DEVICE), matrix(c, seed + 1)
    weights = rules.UpdateRule.make(rule, kappa, c.geometry.dim)
    check(c, x, R, decor_stats(x, R, c.geometry, weights), weights)


CASES = [
    case(2, 5, (9, 8), 3, padding=1),  # D = 45
    case(2, 14, (7, 6), 3, stride=2, padding=2, dilation=2),  # 126
    case(3, 12, (11,), 5, stride=2, padding=4, groups=6),  # 10
    case(2, 2, (4, 5, 6), (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),  # 24
    rows((150, 60)),
    rows((13, 5, 24), groups=3),
    case(1, 1, (1,), 1),
]
LARGEST = 64


@pytest.mark.parametrize("c", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_64_bit_addresses_agree_bit_for_bit(c, dtype, precision):
    precision("tf32")
    x, R = c.input(dtype).to(DEVICE), matrix(c)
    result = decor_stats(x, R, c.geometry)
    check(c, x, R, result, bound=2e-3)
    again = decor_stats(x, R, c.geometry)
    wide = decor_stats(x, R, c.geometry, index64=True)
    for a, b, d in zip(result, again, wide):
        assert torch.equal(a, b)
        assert torch.equal(a, d)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_configuration(name, precision):
    precision(name)
    for config in configs(KERNEL, name, TARGET):
        for dim in (config.block_m, config.block_m // 2 + 1):
            c = rows((3, 50, dim))
            x, R = c.input(torch.float32).to(DEVICE), matrix(c)
            bound = 4e-6 if name == "ieee" else 2e-3
            check(c, x, R, decor_stats(x, R, c.geometry, config=config), bound=bound)


def test_tf32_is_exact_for_what_tf32_can_hold(precision):
    precision("tf32")
    c = rows((40, 33))
    x = torch.randint(-8, 9, c.shape, device=DEVICE).float() / 8
    eye = torch.eye(33, device=DEVICE)[None]
    check(c, x, eye, decor_stats(x, eye, c.geometry), bound=1e-6)


def test_the_operands_may_have_any_strides():
    c = case(2, 3, (6, 5), 3, padding=1)
    x, R = c.input(torch.float32).to(DEVICE), matrix(c)
    for layout in LAYOUTS:
        other = strided(x, layout)
        check(c, other, R, decor_stats(other, strided(R, "reversed"), c.geometry))


def test_fits():
    assert fits(rows((9, LARGEST)).geometry, TARGET, "ieee")
    assert not fits(rows((9, LARGEST + 1)).geometry, TARGET, "ieee")
    assert fits(rows((9, 128)).geometry, TARGET, "tf32")
    assert not fits(rows((9, 129)).geometry, TARGET, "tf32")
    assert not fits(rows((0, 8)).geometry, TARGET, "ieee")
    with pytest.raises(ValueError, match="D=129"):
        choose_config(rows((9, 129)).geometry, "tf32", DEVICE)


# ---------------------------------------------------------------------------- compiled code


def stats_in_simulator(target, name, c, dtype, seed):
    torch.set_float32_matmul_precision(PRECISIONS[name])
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    x, R = c.input(dtype, seed), c.R(torch.float32, seed + 1)
    with simulator.simulated(target, seed) as launched:
        result = decor_stats(x, R, c.geometry)
    return x, R, result, launched


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_compiled_code(compiled, target, dtype, number):
    c = CASES[number]
    for seed, name in enumerate(PRECISIONS):
        if fits(c.geometry, target, name):
            x, R, result, launched = compiled(stats_in_simulator, target, name, c, dtype, seed)
            check(c, x, R, result, bound=4e-6 if name == "ieee" else 2e-3)
            assert launched == ["decor_stats_kernel", "decor_stats_reduce_kernel"]
