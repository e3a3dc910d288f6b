"""The cuda backend behind the opaque ops, every kernel emulated, against the float64 definitions."""

import dataclasses
import weakref

import pytest
import torch
from emulation import record
from helpers import (
    LAYOUTS,
    Products,
    case,
    cases,
    error,
    moment_error,
    products_of_change,
    random,
    rows,
    strided,
    updated,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import emulated

import dbp_kernels as dbp
from bench.counters.cuda_ptx import array
from dbp_kernels import backends, precision, reference, rules
from dbp_kernels.backends.cuda import gram, library, ops, stats, update
from dbp_kernels.choose import gram_choices
from dbp_kernels.planning import planner
from dbp_kernels.planning.boxes import shift_program
from dbp_kernels.planning.choice import Choice
from dbp_kernels.sample_memory import SampleMemory

pytestmark = pytest.mark.emulation
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bound(plain: float) -> float:
    """What err(ours) may be when plain torch in that precision has the error ``plain``."""
    return 2 * plain + 1e-6


FORMS = {
    "shift": gram.patch_gram_shift,
    "box": gram.patch_gram_box,
    "direct": gram.patch_gram_direct,
}


@settings(max_examples=60)
@given(
    c=cases(max_channels=12),
    form=st.sampled_from(list(FORMS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_patch_gram_of_any_layout(c, form, dtype, layout, seed):
    x = c.input(dtype, layout=layout)
    with emulated(seed) as launched:
        S = FORMS[form](x, c.geometry)
    assert launched[-1] == "reduce"
    assert set(launched) <= {"pack", "gram_shift", "gram_box", "gram_direct", "reduce"}
    assert S.dtype == torch.float32
    # products of the inputs are exact, so only sums in float32 err
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5
    assert torch.equal(S, S.mT)


@settings(max_examples=25)
@given(
    c=st.one_of(
        cases(max_channels=12).filter(lambda c: set(c.stride) == {1}),
        st.sampled_from([rows((70, 20), 2), case(3, 24, (5, 6), 1, groups=3)]),
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_kernels_for_sm90_on_request(c, dtype, layout, seed):
    x = c.input(dtype, layout=layout)
    with emulated(seed) as launched:
        S = ops.patch_gram(x, c.geometry, Choice("cuda_sm90", 0.0, 0.0))
    if c.geometry.pointwise:
        assert "gram_matrix_sm90" in launched
    else:  # without a pixel that two taps see there is no main box
        assert "gram_shift_sm90" in launched or not shift_program(c.geometry.axes).boxes
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5
    assert torch.equal(S, S.mT)


@pytest.mark.parametrize("sm90", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("step", [0, 8])
def test_pixels_that_share_memory(step, kernel, sm90):
    """Expanded, or windows that overlap; the kernels by rows want rows that do not."""
    x = torch.randn(16 + 3 * 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.as_strided((4, 16, 1, 1), (step, 1, 16, 16))
    c = case(4, 16, (1, 1), kernel, padding=kernel // 2)
    choice = Choice("cuda_sm90" if sm90 else "cuda_shift", 0.0, 0.0)
    with emulated():
        S = ops.patch_gram(x, c.geometry, choice)
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5


@pytest.mark.parametrize(
    ("stride", "dtype", "reason"),
    [(2, torch.bfloat16, "strided"), (1, torch.float32, r"not torch\.float32")],
)
def test_kernels_for_sm90_say_what_they_do_not_cover(stride, dtype, reason):
    c = case(2, 8, (6, 6), 3, stride=stride)
    x, choice = c.input(dtype), Choice("cuda_sm90", 0.0, 0.0)
    with emulated(), pytest.raises(RuntimeError, match=reason):
        ops.patch_gram(x, c.geometry, choice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_input_is_not_copied(dtype):
    x = random((2, 16, 6, 7), dtype).contiguous(memory_format=torch.channels_last)
    c = case(2, 16, (6, 7), 3, padding=1)
    with emulated() as launched:
        gram.patch_gram_shift(x, c.geometry)
    assert launched == ["gram_shift", "gram_box", "reduce"]
    with emulated() as launched:
        gram.patch_gram_shift(x[:, :, 1:], case(2, 16, (5, 7), 3).geometry)
    assert launched == ["pack", "gram_shift", "gram_box", "reduce"]  # pixels not evenly spaced


@pytest.mark.parametrize("form", ["shift", "box"])
@pytest.mark.parametrize("c", [case(2, 13, (6, 7), 3, padding=1), rows((5, 7, 13))], ids=str)
def test_rows_with_room_are_not_copied(c, form):
    x = c.input(torch.bfloat16)
    dim = 1 if c.kernel else -1
    roomy = strided(x.movedim(dim, 1), "rows").movedim(1, dim)
    if not c.kernel:
        form = "box"
    with emulated() as launched:
        S = FORMS[form](roomy, c.geometry)
        assert "pack" not in launched
        assert torch.equal(S, FORMS[form](x, c.geometry))
        assert "pack" in launched


@pytest.mark.parametrize("channels", [13, 16])
def test_a_sample_is_packed_when_it_is_taken(channels):
    x = random((6, channels, 5, 4), torch.bfloat16)
    c = case(4, channels, (5, 4), 3, padding=1)
    with emulated() as launched:
        memory = SampleMemory(x, 4, None, torch.bfloat16, "cuda")
        for batch in (x, x.flip(0)):
            sample = memory.write(batch, 4, None)
            assert torch.equal(sample, batch[:4])
        assert launched == 3 * ["pack"]
        S = ops.patch_gram(sample, c.geometry, Choice("cuda_shift", 0.0, 0.0))
        assert launched[3:] == ["gram_shift", "gram_box", "reduce"]
        assert torch.equal(S, gram.patch_gram_shift(batch[:4], c.geometry))


@pytest.mark.parametrize(
    "c",
    [case(2, 8, (6, 5), 3, padding=1), case(3, 3, (9, 9), 5, stride=2), case(2, 24, (4, 4), 1)],
    ids=str,
)
def test_one_shape_in_many_layouts(c):
    """Each of them prepared once, whichever came before; nothing keeps an input alive."""
    x, R = c.input(torch.bfloat16), c.R(torch.float32)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    inputs = [*(strided(x, layout) for layout in LAYOUTS), moved]
    with emulated():
        for _ in range(2):
            for one in inputs:
                S = torch.ops.dbp.patch_gram(one, *c.arguments)
                assert moment_error(S, reference.patch_gram(one.double(), *c.arguments)) < 1e-5
                torch.ops.dbp.decor_stats(one, R, *c.arguments)
        alive = weakref.ref(moved)
        del inputs, moved, one
        assert alive() is None


def test_prepared_in_inference_mode_and_used_outside():
    c = case(2, 8, (5, 7), 3, padding=1)
    x = c.input(torch.float32)
    with emulated():
        with torch.inference_mode():
            first = torch.ops.dbp.patch_gram(x, *c.arguments)
        second = torch.ops.dbp.patch_gram(x.requires_grad_(), *c.arguments)
        second.sum().backward()
    assert torch.equal(first, second)
    assert not second.is_inference()


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_matmul_precision_decides_between_ieee_and_tf32(precision):
    c = case(4, 24, (8, 8), 3, padding=1)
    x = c.input(torch.float32)
    exact = reference.patch_gram(x.double(), *c.arguments)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        for form in FORMS.values():
            with emulated():
                difference = moment_error(form(x, c.geometry), exact)
            assert difference < 1e-6 if precision == "ieee" else 1e-6 < difference < 1e-3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("c", "choice", "expected"),
    [
        (case(3, 20, (7, 6), 3, padding=1), "cuda_shift", ["pack", "gram_shift", "gram_box"]),
        (case(3, 20, (7, 6), 3, stride=2), "cuda_shift", ["pack", "gram_box"]),
        (case(2, 3, (9, 9), 7, stride=2, padding=3), "cuda_direct", ["gram_direct"]),
        (case(4, 32, (5, 5), 1), "cuda_direct", ["pack", "gram_box"]),
        (rows((30, 72), 2), "cuda_direct", ["gram_box"]),
        (case(3, 20, (7, 6), 3, padding=1), "unfold", []),
    ],
    ids=str,
)
def test_kernels_of_a_choice(c, choice, expected):
    x = c.input(torch.bfloat16)
    with emulated() as launched:
        S = ops.patch_gram(x, c.geometry, Choice(choice, 0.0, 0.0))
    assert launched == expected + ["reduce"] * bool(expected)
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5


def test_every_launch_fits_the_smallest_gpu():
    """Dynamic shared memory of all kernels, at every tile and dtype: 99 KB on sm_86, 89 and 120."""
    needed = {}

    def note(kernel, arguments):
        arrays = {k: array(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        for launch in record(kernel, **arrays):
            name = launch["kernel"]
            needed[name] = max(needed.get(name, 0), launch["shared_bytes"])

    wide = case(1, 128, (24, 64), 3, padding=1)  # a halo of two lines and a bit
    small = [case(1, channels, (3, 3), 3, padding=1) for channels in (1, 5, 14)]
    library.simulate(note)
    try:
        for dtype in DTYPES:
            for x, geometry in [(c.input(dtype), c.geometry) for c in (wide, *small)]:
                for block in gram.BLOCKS:
                    gram.patch_gram_box(x, geometry, block)
                    gram.patch_gram_direct(x, geometry, block)
                    if block in gram.SHIFT_BLOCKS:
                        gram.patch_gram_shift(x, geometry, block)
            for c in small:
                stats.decor_stats(c.input(dtype), c.R(torch.float32), c.geometry)
    finally:
        library.simulate(None)
    for name in ("gram_box", "gram_direct", "gram_shift", "pack", "reduce", "stats"):
        assert [kernel for kernel in needed if f"{name}_kernel" in kernel], name
    assert max(needed.values()) > 48 * 1024  # some ask for more than they get unasked
    assert {name: n for name, n in needed.items() if n > 99 * 1024} == {}


def test_planner_offers_the_kernels():
    wide = case(256, 64, (56, 56), 3, padding=1).geometry
    first = case(256, 3, (224, 224), 7, stride=2, padding=3).geometry
    with emulated():
        assert gram_choices(wide, "cuda", torch.bfloat16)[0].name == "cuda_shift"
        names = [choice.name for choice in gram_choices(first, "cuda", torch.bfloat16)]
    assert {"cuda_direct", "cuda_shift", "self_wgrad", "unfold"} <= set(names)
    assert not [name for name in names if name.startswith("triton")]


@pytest.mark.parametrize(
    ("c", "kernel"),
    [
        (case(2, 64, (6, 5), 3, padding=1), "gram_shift_sm90"),
        (rows((300, 128)), "gram_matrix_sm90"),
        (case(2, 64, (6, 5), 3, stride=2), None),
    ],
    ids=str,
)
def test_planner_offers_the_kernels_of_a_device_of_capability_9_0(c, kernel, monkeypatch):
    monkeypatch.setattr(library, "sm90_problem", lambda device=None: None)
    # so fast that they are the choice wherever they are offered
    free = {"sm90": ((64, 1e6), (128, 1e6)), "call": 1e-12, "gbytes": 1e9}
    fast = dataclasses.replace(planner.machine("cuda", "bf16"), **free)
    planner.reset()
    monkeypatch.setattr(planner, "machine", lambda *arguments: fast)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            x = c.input(dtype)
            with emulated() as launched:
                S = torch.ops.dbp.patch_gram(x, *c.arguments)
                layer = torch.nn.Conv2d(64, 2, 3, dtype=dtype)
                table = str(dbp.explain(layer, random((8, 64, 28, 28), dtype), sample=1.0))
            wanted = {kernel} if kernel and dtype == torch.bfloat16 else set()
            assert {name for name in launched if "sm90" in name} == wanted
            assert ("cuda_sm90" in table) == (dtype == torch.bfloat16)
            assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5
    finally:
        monkeypatch.undo()
        planner.reset()


@pytest.mark.parametrize(
    ("capability", "build", "runs"),
    [
        ((9, 0), "nvcc 13.0, targets 8.0 9.0a", True),
        ((9, 0), "nvcc 13.0, targets 8.0 9.0", False),
        ((9, 0), None, False),
        ((10, 0), "nvcc 13.0, targets 8.0 9.0a", False),
    ],
)
def test_where_the_kernels_of_capability_9_0_run(capability, build, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(library, "build_text", lambda: build)
    assert (library.sm90_problem() is None) == runs


@settings(max_examples=60)
@given(
    c=st.one_of(cases(max_channels=4), st.just(rows((5, 7, 12), 3))),
    way=st.sampled_from(["fused", "gram", "direct"]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_decor_stats(c, way, dtype, layout, seed):
    x, R = c.input(dtype, layout=layout), c.R(torch.float32)
    if way == "fused" and not stats.supported(x, c.geometry):
        way = "gram"
    exact = reference.decor_stats(x.double(), R.double(), *c.arguments)
    plain = reference.decor_stats(x.float(), R, *c.arguments)
    with emulated(seed) as launched:
        S = gram_choices(c.geometry, "cuda", dtype)[0]
        ours = ops.decor_stats(x, R, c.geometry, Choice(way, 0.0, 0.0, gram=S))
    assert ("stats" in launched) == (way == "fused")
    for result, oracle, rival in zip(ours, exact, plain):
        assert result.dtype == torch.float32
        assert error(result, oracle) <= bound(error(rival, oracle))


@pytest.mark.parametrize("channels", [2, 15])  # D = 18, and 135: too long for the fused kernel
def test_decor_stats_by_the_way_of_the_planner(channels):
    c = case(2, channels, (4, 4), 3, padding=1)
    x, R = c.input(torch.float32), c.R(torch.float32)
    assert stats.supported(x, c.geometry) == (channels == 2)
    exact = reference.decor_stats(x.double(), R.double(), *c.arguments)
    with emulated():
        ours = torch.ops.dbp.decor_stats(x, R, *c.arguments)
    for result, oracle in zip(ours, exact):
        assert error(result, oracle) < 1e-5


def test_more_groups_than_a_grid_has_lines_are_not_for_the_fused_kernel():
    for groups, fits in ((2**16 - 1, True), (2**16, False)):
        c = case(1, groups, (1, 1), 1, groups=groups)
        assert stats.supported(c.input(torch.float32), c.geometry) == fits


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70)),
    rule=st.sampled_from(rules.RULES),
    kappa=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_gram_update(shape, rule, kappa, seed):
    groups, dim = shape
    Z = random((groups, 2 * dim, dim), seed=seed)
    S = Z.mT @ Z / Z.shape[1]
    R = torch.eye(dim) + random((groups, dim, dim), torch.float32, seed + 1) / dim
    exact = rules.update_from_gram(S.float().double(), R.double(), 0.01, kappa, rule)
    plain = rules.update_from_gram(S.float(), R, 0.01, kappa, rule)
    for overwrite in (False, True):
        ours_S = S.float()
        with emulated(seed) as launched:
            weights = rules.UpdateRule.make(rule, kappa, dim)
            due = update.gram_update(ours_S, R, weights, overwrite)
            ours = due.new(R, 0.01), due.loss
        assert launched == ["update"]
        assert overwrite or torch.equal(ours_S, S.float())
        for result, oracle, rival in zip(ours, exact, plain):
            assert error(result, oracle) <= bound(error(rival, oracle))


@pytest.mark.parametrize("images", [4, 400, 3000], ids=["samples", "direct", "gram"])
def test_precision_of_each_product_of_an_update(images, monkeypatch):
    """By default what forms R S R^T, kernels and library calls, is float32 and M' R is TF32."""
    monkeypatch.setattr(precision, "on_cuda", lambda x: True)
    launch, products, kernels = library.launch, Products(), []

    def spy(kernel, **arguments):
        kernels.append((kernel, torch.backends.cuda.matmul.fp32_precision))
        launch(kernel, **arguments)

    monkeypatch.setattr(library, "launch", spy)
    layer = dbp.nn.DecorLinear(300, 2)
    optimizer = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0)
    layer(random((images, 300), torch.float32))
    with emulated(), precision.matmul_precision("high"):
        with precision.update_precision(None, True):
            last = products_of_change(images, 300)
        with products:
            optimizer.step()
    assert products.seen[-last:] == ["tf32"] * last
    assert set(products.seen[:-last]) == {"ieee"}
    assert {setting for _, setting in kernels} <= {"ieee", "none"}


@pytest.mark.parametrize("plan", ["gram", "direct", "samples"])
@pytest.mark.parametrize("demean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "c",
    [case(4, 6, (9, 8), 3, padding=1), case(9, 5, (7,), 2, stride=2), rows((30, 8), 2)],
    ids=str,
)
def test_decor_update(c, dtype, demean, plan):
    x, R = c.input(dtype), c.R(torch.float32)
    rest = (1e-2, 0.4, "normalized", demean)
    exact = reference.decor_update(x.double(), R.double(), *c.arguments, *rest)
    plain = reference.decor_update(x.float(), R, *c.arguments, *rest)
    with emulated() as launched:
        gram = gram_choices(c.geometry, "cpu", dtype)[0]
        R_new, loss = updated(ops, x, R, c.geometry, *rest, Choice(plan, 0.0, 0.0, gram=gram))
    assert ("update" in launched) == (plan != "samples")
    for result, oracle, rival in zip((R_new, loss.mean()), exact, plain):
        assert error(result, oracle) <= bound(error(rival, oracle))


def test_decor_update_by_the_plan_of_the_planner():
    c = case(4, 6, (9, 8), 3, padding=1)
    x, R = c.input(torch.float32), c.R(torch.float32)
    exact = reference.decor_update(x.double(), R.double(), *c.arguments, 1e-2, 0.4)
    with emulated():
        ours = torch.ops.dbp.decor_update(x, R, *c.arguments, 1e-2, 0.4)
    for result, oracle in zip(ours, exact):
        assert error(result, oracle) < 1e-5


def test_float64_is_left_to_the_eager_backend():
    c = case(2, 3, (5, 5), 3, padding=1)
    x, R = c.input(), c.R()
    with emulated() as launched:
        S = torch.ops.dbp.patch_gram(x, *c.arguments)
        C, _ = torch.ops.dbp.decor_stats(x, R, *c.arguments)
        R_new, _ = torch.ops.dbp.decor_update(x, R, *c.arguments, 0.1, 0.5)
    assert launched == []
    assert S.dtype == C.dtype == R_new.dtype == torch.float64
    assert error(S, reference.patch_gram(x, *c.arguments)) < 1e-13


def test_backend_is_used_only_where_it_can_be_and_is_asked_for():
    assert backends.selected("cpu") == "eager"
    assert "CUDA" in backends.unusable("cuda", "cpu") or "not built" in backends.unusable(
        "cuda", "cpu"
    )
    with (
        dbp.backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' was requested, but"),
    ):
        dbp.patch_gram(torch.zeros(1, 1, 3, 3), 3)
    with emulated():
        assert backends.selected("cpu") == "cuda"
    assert not library.simulated()
