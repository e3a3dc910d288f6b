"""The update's symmetric product and epilogue: half the tiles, the same update."""

import contextlib

import pytest
import simulator
import torch
import triton
import triton.language as tl
from helpers import DEVICE, Products, error, random
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import precision as precision_module
from dbp_kernels import rules
from dbp_kernels.backends import prepared
from dbp_kernels.backends.triton import product, runtime
from dbp_kernels.backends.triton.configs import configs
from dbp_kernels.backends.triton.dot import round_tf32
from dbp_kernels.backends.triton.update import (
    KERNEL,
    choose_config,
    direct_update,
    gram_update,
    symmetric_update,
    upper_tile,
)
from dbp_kernels.precision import products_in

pytestmark = pytest.mark.usefixtures("poison")

LR = 0.5  # large, so that an error is not hidden behind R itself
PRECISIONS = ("ieee", "tf32x3", "tf32")
TARGET = runtime.target(DEVICE) if DEVICE.type == "cuda" else 90
CONFIGS = [
    pytest.param(precision, config, id=f"{precision} {config.text}")
    for precision in PRECISIONS
    for config in configs(KERNEL, precision, TARGET)
]


@pytest.fixture(autouse=True)
def precision():
    """Sets the precision of an update's products for one test."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(products_in("ieee"))
        yield lambda name: stack.enter_context(products_in(name))


def problem(groups, n, dim, seed=0):
    """Z (G, n, D) and R (G, D, D), float32."""
    z = random((groups, n, dim), torch.float32, seed)
    r = torch.eye(dim) + 0.5 * random((groups, dim, dim), torch.float32, seed + 1) / dim**0.5
    return z.to(DEVICE), r.to(DEVICE)


def second_moment(z):
    return z.mT @ z / z.shape[1]


def tf32(x):
    """Rounded to the nearest tf32 value, ties away from zero: in float64, by the definition."""
    mantissa, exponent = torch.frexp(x.double())
    ties = (mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign()
    return torch.ldexp(ties / 2**11, exponent)


def expected_update(A, B, alpha, rule):
    """E, loss and ||E||^2 (with v = -1 for what has no variance) of M = alpha A B^T in float64."""
    M = alpha * A.double() @ B.double().mT
    second = M.diagonal(dim1=1, dim2=2)
    v = second - 1
    C = M - torch.diag_embed(second)
    off, on = C.square().sum((1, 2)), v.square().sum(1)
    stepped = v.masked_fill(second == 0, 0) if rule.guarded else v
    E = rule.c_weight * C + torch.diag_embed(rule.v_weight * stepped)
    loss = (rule.c_weight * off + rule.kappa * on) / rule.loss_scale
    return E, loss, rule.c_weight**2 * off + rule.v_weight**2 * on


def result(update, r):
    """R_new and loss."""
    return update.new(r, LR), update.loss


def rule_of(dim, kappa=0.5, rule="standard", guarded=False):
    return rules.UpdateRule.make(rule, kappa, dim, guarded)


@given(
    groups=st.integers(1, 3),
    n=st.integers(1, 40),
    dim=st.integers(1, 70),
    kappa=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rule=st.sampled_from(rules.RULES),
    seed=st.integers(0, 1000),
)
def test_both_plans_match_the_oracle(groups, n, dim, kappa, rule, seed):
    z, r = problem(groups, n, dim, seed)
    S = second_moment(z)
    arguments = LR, kappa, rule
    for ours, plain, source in (
        (gram_update, rules.update_from_gram, S),
        (direct_update, rules.update_direct, z),
    ):
        expected = plain(source.double(), r.double(), *arguments)
        torchs = plain(source, r, *arguments)
        got = result(ours(source, r, rule_of(dim, kappa, rule)), r)
        assert got[1].shape == (groups,)
        for found, reference, exact in zip(got, torchs, expected):
            # of v = M - 1 digits are lost where the loss is small
            small = exact is expected[1] and exact.max() < 1
            lost = max(1e-12, exact.max().item()) ** -0.5 if small else 1.0
            assert error(found, exact) <= 2 * error(reference, exact) + 1e-6 * lost


@given(
    groups=st.integers(1, 3),
    dim=st.integers(1, 70),
    kappa=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rule=st.sampled_from(rules.RULES),
    guarded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_has_no_variance_and_the_norm(groups, dim, kappa, rule, guarded, seed):
    z, _ = problem(groups, 9, dim, seed)
    z[:, :, dim // 2] = 0
    z[0] = 0
    A = z.mT.contiguous()
    weights = rule_of(dim, kappa, rule, guarded)
    E, loss, square = symmetric_update(A, A, 1 / 9, weights)
    exact_E, exact_loss, exact_square = expected_update(A, A, 1 / 9, weights)
    assert error(E, exact_E) < 1e-6
    assert error(loss, exact_loss) < 2e-6
    assert not E[:, dim // 2].any() or not guarded
    if guarded:
        assert error(square, exact_square) < 2e-6
    else:
        assert square is None


@pytest.mark.parametrize("source", ["gram", "direct"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, ["ieee", "tf32x3", "tf32"]), ("highest", ["ieee"] * 3), ("high", ["tf32"] * 3)],
)
@pytest.mark.parametrize("large", [False, True])
def test_precision_of_each_product(name, expected, source, large, precision, monkeypatch):
    """P or X, by a kernel where it is large, M by the kernel, M' R, as DecorUpdate sets them."""
    monkeypatch.setattr(precision_module, "on_cuda", lambda x: True)
    if large:
        monkeypatch.setattr(product, "_WORTH", 0)
        monkeypatch.setattr(product, "_THIN", 0)
        prepared.forget()  # that it is the library's
        expected = ["tf32x3" if name is None else expected[0], *expected[1:]]
    products = Products()

    def spy(launch, **tensors):
        fixed = dict(zip(reversed(launch._kernel.arg_names), reversed(launch._fixed)))
        products.seen.append(fixed["PRECISION"])
        start(launch, **tensors)

    start = runtime.Launch.__call__
    monkeypatch.setattr(runtime.Launch, "__call__", spy)
    z, r = problem(2, 30, 20)
    ours, inputs = (gram_update, second_moment(z)) if source == "gram" else (direct_update, z)
    precision("tf32")
    with precision_module.update_precision(name, True), products:
        ours(inputs, r, rule_of(20))
    assert products.seen == expected


@pytest.mark.parametrize(("name", "config"), CONFIGS)
@pytest.mark.parametrize("dim", [1, 37, 130])
def test_every_configuration(precision, name, config, dim):
    """Against the product of the operands as the tensor cores see them."""
    precision(name)
    _, r = problem(2, 3, dim)
    A = torch.randn_like(r) @ r.mT
    M = A @ A.mT  # any symmetric product will do
    A, B = M, torch.eye(dim, device=DEVICE).expand_as(M)
    A = tf32(A).float() if name == "tf32" else A
    rule = rules.UpdateRule.make("normalized", 0.3, dim)
    E, loss, _ = symmetric_update(A, B, 0.7, rule, config)
    exact_E, exact_loss, _ = expected_update(A, B, 0.7, rule)
    assert error(E, exact_E) < 1e-6
    assert error(loss, exact_loss) < 2e-6
    assert torch.equal(E, E.mT)
    again = symmetric_update(A, B, 0.7, rule, config)
    assert torch.equal(again[0], E)
    assert torch.equal(again[1], loss)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_long_inner_dimension(precision, name, config):
    """X X^T with K neither a multiple of the step nor of 16, and with one that is."""
    precision(name)
    for inner in (1, 45, 96):
        X = random((2, 19, inner), torch.float32).to(DEVICE)
        operand = tf32(X) if name == "tf32" else X
        rule = rules.UpdateRule.make("standard", 0.5, 19)
        E, loss, _ = symmetric_update(X, X, 1 / inner, rule, config)
        exact_E, exact_loss, _ = expected_update(operand, operand, 1 / inner, rule)
        assert error(E, exact_E) < 1e-6
        assert error(loss, exact_loss) < 2e-6


def test_the_second_moment_is_workspace_on_request():
    z, r = problem(2, 20, 21)
    S = second_moment(z)
    expected = result(gram_update(S, r, rule_of(21)), r)
    assert torch.equal(S, second_moment(z))
    found = result(gram_update(S, r, rule_of(21), overwrite=True), r)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_strided_operands():
    z, r = problem(1, 20, 21)
    S = second_moment(z)
    S, several = S.expand(3, 21, 21), r.expand(3, 21, 21)
    expected = result(gram_update(S, several.contiguous(), rule_of(21)), several)
    strided = r.mT.contiguous().mT.expand(3, 21, 21)
    for a, b in zip(result(gram_update(S, strided, rule_of(21)), strided), expected):
        assert error(a, b) < 1e-6


@triton.jit
def upper_tiles_kernel(out, side):
    row, column = upper_tile(tl.program_id(0), side)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("side", range(1, 10))
def test_upper_tiles_are_the_upper_triangle(side):
    count = side * (side + 1) // 2
    out = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
    runtime.launch(upper_tiles_kernel, (count,), out, side, num_warps=1, num_stages=1)
    triangle = {(i, j) for i in range(side) for j in range(i, side)}
    assert set(map(tuple, out.tolist())) == triangle


@triton.jit
def round_kernel(x, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, round_tf32(tl.load(x + index, mask=index < n)), mask=index < n)


def rounded(x):
    out = torch.full_like(x, 77)
    runtime.launch(round_kernel, (1,), x, out, x.numel(), BLOCK=512, num_warps=1, num_stages=1)
    return out


def test_round_tf32():
    x = torch.cat([torch.randn(200) * 10.0**e for e in (-9, 9)]).to(DEVICE)
    ties = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 0.0], device=DEVICE)
    x = torch.cat([x, ties])
    assert torch.equal(rounded(x).double(), tf32(x))


def test_round_tf32_keeps_what_is_not_finite():
    ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs all ones
    x = torch.cat([ones, torch.tensor([float("nan"), float("inf"), -float("inf")])]).to(DEVICE)
    result = rounded(x)
    assert result[:3].isnan().all()
    assert torch.equal(result[3:], x[3:])


@pytest.mark.parametrize("name", PRECISIONS)
def test_small_matrices_take_small_tiles_and_large_ones_large(name):
    assert choose_config(512, 9, 9, name, DEVICE).block_m == 16
    assert choose_config(1, 4608, 4608, name, DEVICE).block_m >= 64
    assert choose_config(1, 4600, 4607, name, DEVICE).block_m <= 64


# ---------------------------------------------------------------------------- compiled code


def update_in_simulator(target, name, config, groups, dim, inner, seed):
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    X = random((groups, dim, inner), torch.float32, seed)
    rule = rules.UpdateRule.make("standard", 0.3, dim)
    with simulator.simulated(target, seed), products_in(name):
        return X, *symmetric_update(X, X, 1 / inner, rule, config)[:2]


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(("dim", "inner"), [(21, 19), (144, 48)])
def test_compiled_code(compiled, target, name, dim, inner):
    rule = rules.UpdateRule.make("standard", 0.3, dim)
    for seed, config in enumerate(configs(KERNEL, name, target)):
        if config.block_m >= 4 * dim or (config.block_m > 64 and dim % 16):
            continue
        X, E, loss = compiled(update_in_simulator, target, name, config, 2, dim, inner, seed)
        operand = tf32(X) if name == "tf32" else X
        exact_E, exact_loss, _ = expected_update(operand, operand, 1 / inner, rule)
        assert error(E, exact_E) < 1e-6, config.text
        assert error(loss, exact_loss) < 2e-6, config.text
