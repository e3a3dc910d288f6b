"""A B^T on tensor cores as exact as in float32: every tile, ragged sizes, what the planner may use."""

import pytest
import simulator
import torch
import triton
import triton.language as tl
from helpers import DEVICE, error, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import precision as precision_module
from dbp_kernels import rules
from dbp_kernels.backends.triton import ops, product, runtime, update
from dbp_kernels.backends.triton.configs import configs
from dbp_kernels.precision import products_in, update_precision

pytestmark = pytest.mark.usefixtures("poison")

TARGET = runtime.target(DEVICE) if DEVICE.type == "cuda" else 90
CONFIGS = configs(product.KERNEL, product.PRECISION, TARGET)
SIZES = ((1, 1, 1), (200, 70, 45), (97, 128, 32), (33, 150, 96), (130, 256, 16), (7, 5, 1))
BOUND = 1e-6  # of float32; operands rounded to TF32 lose some 3e-4


def operands(groups, rows, columns, inner, seed=0):
    """Rounded to float32 and not to TF32."""
    A = random((groups, rows, inner), torch.float32, seed)
    return A.to(DEVICE), random((groups, columns, inner), torch.float32, seed + 1).to(DEVICE)


def exact(A, B):
    return A.double() @ B.double().mT


@pytest.fixture
def always(monkeypatch):
    """The kernel takes products of every size, on any GPU."""
    monkeypatch.setattr(product, "_FAST", (TARGET,))
    monkeypatch.setattr(product, "_WORTH", 0)
    monkeypatch.setattr(product, "_THIN", 0)


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that are started, in their order."""
    names = []
    start = runtime.Launch.__call__

    def spy(launch, **tensors):
        names.append(launch._kernel.__name__)
        start(launch, **tensors)

    monkeypatch.setattr(runtime.Launch, "__call__", spy)
    return names


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param(config, sizes, id=f"{config.text} {sizes}")
        for config in CONFIGS
        for sizes in SIZES
        if product.usable(config, *sizes[1:])
    ],
)
def test_every_configuration(config, sizes):
    A, B = operands(2, *sizes)
    C = product.product(A, B, config)
    assert C.is_contiguous()
    assert error(C, exact(A, B)) < BOUND
    assert torch.equal(product.product(A, B, config), C)


@settings(max_examples=30)
@given(*[st.integers(1, n) for n in (3, 140, 140, 70)], st.integers(0, 1000))
def test_any_size(groups, rows, columns, inner, seed):
    A, B = operands(groups, rows, columns, inner, seed)
    assert error(product.product(A, B, CONFIGS[-1]), exact(A, B)) < BOUND


def test_strided_operands():
    A, B = operands(2, 20, 30, 21)
    expected = product.product(A, B, CONFIGS[-1])
    for a, b in (
        (A.mT.contiguous().mT, B),
        (A, B.mT.contiguous().mT),
        (torch.cat([A, A], 2)[:, :, :21], torch.cat([B, B], 1)[:, :30]),
    ):
        assert torch.equal(product.product(a, b, CONFIGS[-1]), expected)
    shared = product.product(A[:1].expand(3, 20, 21), B[:1].expand(3, 30, 21), CONFIGS[-1])
    assert torch.equal(shared, expected[:1].expand(3, 20, 30))


def test_what_is_not_finite_stays_so():
    A, B = operands(1, 70, 80, 40)
    A[0, 3, 5], A[0, 66, 7], B[0, 77, 9] = float("nan"), float("inf"), -float("inf")
    check_not_finite(product.product(A, B, CONFIGS[-1]), A, B)


def check_not_finite(C, A, B):
    """Where a float32 product is not finite it is not either, and a NaN is never an Inf."""
    plain = A.cpu() @ B.cpu().mT
    C = C.cpu()
    assert C[~plain.isfinite()].isfinite().sum() == 0
    assert C[plain.isnan()].isnan().all()
    fine = plain.isfinite()
    assert fine.any()
    assert torch.allclose(C[fine], plain[fine], rtol=1e-5, atol=1e-5)


@triton.jit
def banded_tiles_kernel(out, rows, columns, BAND: tl.constexpr):
    row, column = product.banded_tile(tl.program_id(0), rows, columns, BAND)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 2), (9, 4), (17, 3), (5, 19)])
def test_banded_tiles_are_all_tiles_once(rows, columns):
    count = rows * columns
    out = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
    runtime.launch(
        banded_tiles_kernel, (count,), out, rows, columns, BAND=4, num_warps=1, num_stages=1
    )
    order = [tuple(tile) for tile in out.tolist()]
    assert sorted(order) == [(i, j) for i in range(rows) for j in range(columns)]
    first = order[: 4 * columns]
    assert {row for row, _ in first} == set(range(min(4, rows)))  # a band at a time


def test_only_where_it_should_win(monkeypatch):
    def chosen(*sizes):
        return product.choose_config(*sizes, DEVICE)

    monkeypatch.setattr(product, "target", lambda device: 90)
    smallest = configs(product.KERNEL, product.PRECISION, 90)[-1]
    large = (1, 2304, 2304, 2304)
    assert chosen(*large) == smallest
    assert chosen(4, 1152, 1152, 1152) == smallest
    assert chosen(1, 1274, 4608, 4607) == smallest
    for sizes in ((1, 576, 576, 576), (4, 64, 64, 64), (1, 100, 9216, 9216), (1, 9216, 1, 9216)):
        assert chosen(*sizes) is None, sizes
    for target, fast in ((80, True), (86, False), (89, False), (100, True), (120, False)):
        monkeypatch.setattr(product, "target", lambda device, t=target: t)
        assert (chosen(*large) is not None) == fast, target


def test_what_is_pinned_is_taken_where_it_has_registers(monkeypatch):
    largest, *_, smallest = configs(product.KERNEL, product.PRECISION, 90)
    monkeypatch.setattr(product, "target", lambda device: 90)
    monkeypatch.setattr(product, "pinned", lambda *arguments: largest)
    assert product.choose_config(1, 2304, 2304, 2304, DEVICE) == largest
    assert product.choose_config(1, 2304, 2304, 2303, DEVICE) == smallest
    assert product.choose_config(1, 2304, 2303, 2304, DEVICE) == smallest


@pytest.mark.parametrize("name", ["ieee", "tf32", "tf32x3"])
@pytest.mark.usefixtures("always")
def test_only_in_the_updates_default_precision(name, started):
    A, B = operands(1, 20, 30, 21)
    with products_in(name):
        C = product.product(A, B)
    assert started == ["product_kernel"] * (name == "tf32x3")
    assert error(C, exact(A, B)) < (1e-2 if name == "tf32" else BOUND)


def problem(groups, n, dim, seed=0):
    z = random((groups, n, dim), torch.float32, seed)
    r = torch.eye(dim) + 0.5 * random((groups, dim, dim), torch.float32, seed + 1) / dim**0.5
    return z.to(DEVICE), r.to(DEVICE)


def updated(plan, z, r, kappa, module):
    """(R_new, loss) by a plan of the Triton backend or of plain torch."""
    rule = rules.UpdateRule.make("standard", kappa, r.shape[-1])
    if plan == "gram":
        due = module.gram_update(z.mT @ z / z.shape[1], r, rule)
    else:
        due = (module.direct_update if plan == "direct" else module.low_rank_update)(z, r, rule)
    return due.new(r, 0.5), due.loss


# {plan: the kernels it starts}
STARTED = {
    "gram": ["product_kernel", "symmetric_update_kernel"],
    "direct": ["product_kernel", "symmetric_update_kernel"],
    "samples": ["product_kernel"],
}


@pytest.mark.parametrize("kappa", [0.0, 0.3])
@pytest.mark.parametrize("plan", STARTED)
@pytest.mark.usefixtures("always")
def test_every_plan_is_as_exact_as_in_float32(plan, kappa, started, monkeypatch):
    """In the default precision, but for M' R, which float32 products stand in for here."""
    monkeypatch.setattr(precision_module, "on_cuda", lambda x: False)
    for groups, n, dim in ((1, 17, 40), (3, 30, 33), (2, 64, 64)):
        z, r = problem(groups, n, dim)
        r = r.mT.contiguous().mT  # not contiguous
        expected = updated(plan, z.double(), r.double(), kappa, rules)
        plain = updated(plan, z, r, kappa, rules)
        with update_precision(None, True):
            result = updated(plan, z, r, kappa, ops)
        assert started == STARTED[plan]
        started.clear()
        for got, reference, wanted in zip(result, plain, expected):
            assert error(got, wanted) <= 2 * error(reference, wanted) + BOUND


@pytest.mark.parametrize("plan", STARTED)
@pytest.mark.usefixtures("always")
def test_float64_has_no_kernel(plan, started):
    z, r = problem(1, 12, 20)
    with update_precision(None, True):
        result = updated(plan, z.double(), r.double(), 0.5, ops)
    assert not started
    for got, wanted in zip(result, updated(plan, z.double(), r.double(), 0.5, rules)):
        assert error(got, wanted) < 1e-12


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.usefixtures("always")
def test_steps_take_it_for_samples(layers, started):
    """One layer alone, and two together."""
    model = nn.Sequential(*[dnn.DecorLinear(96, 96) for _ in range(layers)]).to(DEVICE)
    step = dbp.DecorUpdate(model, lr=0.1, sample=1.0)
    model(random((5, 96), torch.float32).to(DEVICE))
    with dbp.backend("triton"):
        step.step()
    assert started == STARTED["samples"]


def test_other_precisions_start_no_product_kernel(started):
    z, r = problem(1, 12, 20)
    for name in ("highest", "high"):
        with update_precision(name, True):
            updated("gram", z, r, 0.5, update)
    assert started == ["symmetric_update_kernel"] * 2


# ---------------------------------------------------------------------------- compiled code


def in_simulator(target, A, B, config):
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    with simulator.simulated(target):
        return product.product(A, B, config)


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(70, 21, 37), (70, 21, 48), (135, 80, 64)])
def test_compiled_code(compiled, target, rows, columns, inner):
    for seed, config in enumerate(configs(product.KERNEL, product.PRECISION, target)):
        if product.usable(config, columns, inner):
            A, B = operands(2, rows, columns, inner, seed)
            C = compiled(in_simulator, target, A.cpu(), B.cpu(), config)
            assert error(C, exact(A, B).cpu()) < BOUND, config.text


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
def test_compiled_code_on_what_is_not_finite(compiled, target):
    A, B = operands(1, 24, 20, 40)
    ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs all ones
    A[0, 3, 5], A[0, 9, 7], A[0, 11, 33] = ones[0], float("inf"), ones[1]
    B[0, 17, 9] = -float("inf")
    config = configs(product.KERNEL, product.PRECISION, target)[-1]
    check_not_finite(compiled(in_simulator, target, A, B, config), A, B)
