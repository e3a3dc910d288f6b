"""The eager backend: every algorithm for S and every plan against the float64 oracle.

torch.empty is filled with NaN throughout (fixture ``poison``), so that nothing unwritten passes.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import (
    LAYOUTS,
    algorithms,
    case,
    cases,
    error,
    moment_error,
    random,
    rows,
    updated,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dbp_kernels as dbp
from dbp_kernels import reference, rules
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager import self_wgrad, unfold
from dbp_kernels.backends.eager import shift as shift_form
from dbp_kernels.planning import layout as planned
from dbp_kernels.planning.calibration import machine
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import make_geometry
from dbp_kernels.planning.planner import gram_choices, update_choices
from dbp_kernels.products import matmul, onednn, rows_times

pytestmark = pytest.mark.usefixtures("poison")

F64 = torch.float64
LOW = (torch.float32, torch.bfloat16, torch.float16)
layouts = st.sampled_from(LAYOUTS)


def ids(value):
    return str(value).removeprefix("torch.")


@contextmanager
def thresholds(zero_columns: bool) -> Iterator[None]:
    """Thresholds so low that small inputs take the paths of large ones, either way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "_OPERATIONS_PER_COPY", 1e9 if zero_columns else 0)
        patch.setattr(shift_form, "_ASSEMBLED_ELEMENTS", 1)
        patch.setattr(shift_form, "_BY_TAP", 1)
        patch.setattr(shift_form, "_MANY_PIXELS", 1)
        patch.setattr(shift_form, "_LINE", 2)
        patch.setattr(planned, "PANEL", 2)
        patch.setattr(planned, "_FEW_ROWS", 1)
        patch.setattr(matmul, "_THIN", 100)
        patch.setattr(matmul, "_LONG", 3)
        patch.setattr(self_wgrad, "WGRAD_POSITIONS", 3)
        patch.setattr(unfold, "_MANY", 1)
        planned.shift_layout.cache_clear()
        try:
            yield
        finally:
            planned.shift_layout.cache_clear()


def check_all(c, x):
    """Every algorithm and the op itself, float64, against the oracle."""
    oracle = reference.patch_gram(x, *c.arguments)
    before = x.clone()
    for choice in algorithms(c.geometry):
        S = eager.patch_gram(x, c.geometry, choice)
        assert moment_error(S, oracle) <= 1e-12, str(choice)
        assert S.dtype == F64
        assert S.is_contiguous()
    assert moment_error(torch.ops.dbp.patch_gram(x, *c.arguments), oracle) <= 1e-12
    assert torch.equal(x, before)


def test_empty_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()
    assert torch.empty(7, 3, dtype=F64).isnan().all()
    assert torch.randn(4).new_empty((50,)).isnan().all()
    assert torch.empty_like(torch.zeros(50, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize(("dims", "examples"), [(1, 200), (2, 250), (3, 100)])
def test_every_algorithm(dims, examples):
    @settings(max_examples=examples)
    @given(cases(dims=(dims,)), layouts, st.integers(0, 1000))
    def check(c, layout, seed):
        check_all(c, c.input(seed=seed, layout=layout))

    check()


@pytest.mark.parametrize("dtype", LOW, ids=ids)
@pytest.mark.parametrize(
    "c",
    [
        case(7, 5, (13, 11), 3),
        case(3, 300, (6, 5), 1),
        case(3, 2, (60, 61), 1),
        case(2, 1, (999,), 80, stride=3),
        case(11, 150, (9, 9), 3, groups=2),
        rows((7, 33)),
        rows((999, 300)),
        rows((3, 999, 40), groups=2),
    ],
    ids=str,
)
def test_the_mean_of_ones_is_one(c, dtype):
    """Sums of ones are exact, and so is what they are divided by."""
    x = torch.ones(c.shape, dtype=dtype)
    for choice in algorithms(c.geometry):
        S = eager.patch_gram(x, c.geometry, choice)
        assert torch.equal(S, torch.ones_like(S)), str(choice)


@pytest.mark.parametrize("zero_columns", [True, False])
@pytest.mark.parametrize(("dims", "examples"), [(1, 80), (2, 120), (3, 40)])
def test_the_paths_of_large_inputs(dims, examples, zero_columns):
    seen = []
    with thresholds(zero_columns):

        @settings(max_examples=examples)
        @given(cases(dims=(dims,), max_batch=5), layouts, st.integers(0, 1000))
        def check(c, layout, seed):
            seen.append(planned.shift_layout(c.geometry, (False,) * dims).zero_columns)
            check_all(c, c.input(seed=seed, layout=layout))

        check()
    assert seen.count(zero_columns or dims == 1) > 0.5 * len(seen)


# Geometries that ought to be hard, whatever hypothesis draws.
CORNERS = [
    case(2, 2, (1,), 1),  # one pixel
    case(1, 2, (1, 1), 3, padding=1),
    case(2, 1, (1, 1), 5, padding=(2, 4)),
    case(1, 1, (1, 1, 1), 3, padding=1),
    case(1, 2, (4, 5), (4, 5)),  # kernel as large as the input
    case(2, 2, (2, 3), (6, 5), padding=(2, 1)),  # as large as the padded input
    case(2, 2, (3, 3), 3, padding=5),  # patches in the padding only
    case(1, 2, (2, 2), 2, padding=6, dilation=5, stride=4),  # some taps never meet a pixel
    case(1, 2, (3,), 1, padding=2),  # kernel 1, but not pointwise
    case(1, 2, (7, 7), (2, 4), padding=(1, 2)),  # even kernels
    case(2, 2, (9, 8), 3, stride=(5, 4), padding=1),  # stride beyond the kernel: pixels unread
    case(2, 2, (9, 8), 1, stride=(2, 3)),
    case(2, 2, (9, 8), (1, 3), stride=2, padding=(0, 1)),
    case(2, 2, (11, 10), 3, stride=2, padding=2, dilation=2),  # one phase only
    case(2, 2, (11, 10), 3, stride=2, padding=1, dilation=3),
    case(2, 2, (12, 13), 7, stride=2, padding=3),
    case(1, 1, (24,), 11, stride=4, padding=2),
    case(2, 6, (6, 7), 3, padding=1, groups=6),  # depthwise
    case(2, 6, (6, 7), 3, padding=1, groups=2),
    case(5, 3, (2, 2), 3, padding=1),
    case(2, 2, (3, 4, 5), (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), dilation=(1, 1, 2)),
    case(2, 2, (4, 4, 4), 3, padding=1, groups=2),
]


@pytest.mark.parametrize("c", CORNERS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_hard_geometries(c, layout):
    check_all(c, c.input(layout=layout))
    for zero_columns in (False, True):
        with thresholds(zero_columns):
            check_all(c, c.input(layout=layout))


@pytest.mark.parametrize("dims", [1, 2])
def test_every_small_geometry(dims):
    """Not drawn but enumerated: one image of one or two channels, every geometry up to a size."""
    limit = {1: (6, 4, 3, 3, 3), 2: (3, 3, 2, 1, 2)}[dims]
    columns = [
        axis
        for axis in itertools.product(
            range(1, limit[0] + 1),
            range(1, limit[1] + 1),
            range(1, limit[2] + 1),
            range(limit[3] + 1),
            range(1, limit[4] + 1),
        )
        if axis[0] + 2 * axis[3] >= axis[4] * (axis[1] - 1) + 1
    ]
    chosen = list(itertools.product(columns, repeat=dims))
    for i, axes in enumerate(chosen[:: max(1, len(chosen) // 300)]):
        size, kernel, stride, padding, dilation = zip(*axes)
        c = case(1, 1 + i % 2, size, kernel, stride, padding, dilation)
        with thresholds(zero_columns=i % 2 == 0):
            check_all(c, c.input(seed=i))


@pytest.mark.parametrize("dtype", LOW, ids=ids)
@pytest.mark.parametrize(("dims", "examples"), [(1, 40), (2, 40), (3, 15)])
def test_low_precision_is_as_good_as_plain_torch(dtype, dims, examples):
    """Both against the oracle on the same rounded input: err <= 2 err(plain) + 1e-6."""

    @settings(max_examples=examples)
    @given(cases(dims=(dims,)), layouts, st.integers(0, 1000))
    def check(c, layout, seed):
        x = c.input(dtype, seed, layout)
        oracle = reference.patch_gram(x.double(), *c.arguments)
        bound = 2 * moment_error(reference.patch_gram(x, *c.arguments), oracle) + 1e-6
        for choice in algorithms(c.geometry):
            S = eager.patch_gram(x, c.geometry, choice)
            assert S.dtype == torch.float32
            assert moment_error(S, oracle) <= bound, str(choice)
        S = torch.ops.dbp.patch_gram(x, *c.arguments)
        assert S.dtype == torch.float32
        assert moment_error(S, oracle) <= bound

    check()


@pytest.mark.parametrize("dtype", [F64, *LOW], ids=ids)
@pytest.mark.parametrize(
    "c",
    [
        case(8, 16, (28, 28), 3, padding=1),
        case(4, 3, (33, 32), 7, stride=2, padding=3),
        case(16, 96, (7, 7), 3, padding=1),  # D = 864: several panels, mirrored
        case(2, 300, (4, 5), 3, padding=1),  # a block has several panels itself
        case(8, 600, (6, 6), 1),
        case(4, 8, (20, 20), 5, padding=2, groups=2),
        case(4, 24, (20, 20), 1),  # many more pixels than channels
        rows((64, 520)),
    ],
    ids=str,
)
def test_layers_of_real_sizes(c, dtype):
    x = c.input(dtype)
    oracle = reference.patch_gram(x.double(), *c.arguments)
    plain = 0.0 if dtype == F64 else moment_error(reference.patch_gram(x, *c.arguments), oracle)
    bound = 1e-12 if dtype == F64 else 2 * plain + 1e-6
    for choice in algorithms(c.geometry):
        S = eager.patch_gram(x, c.geometry, choice)
        assert moment_error(S, oracle) <= bound, str(choice)


@pytest.mark.parametrize(
    "c",
    [
        case(8, 3, (112, 112), 3, padding=1),
        case(4, 1, (160, 160), 3, padding=1),
        case(4, 3, (112, 112), 1),
        case(2, 3, (40_000,), 4, padding=1),
        rows((100_000, 5)),
    ],
    ids=str,
)
def test_long_sums_keep_their_digits(c):
    """Libraries that add up a hundred thousand terms one after the other lose three digits."""
    x = c.input(torch.float32)
    oracle = reference.patch_gram(x.double(), *c.arguments)
    bound = 2 * moment_error(reference.patch_gram(x, *c.arguments), oracle) + 1e-6
    for choice in algorithms(c.geometry):
        assert moment_error(eager.patch_gram(x, c.geometry, choice), oracle) <= bound, str(choice)


@settings(max_examples=60)
@given(cases(max_batch=5), st.integers(1, 2))
def test_chunks_of_images(c, images):
    """Large inputs go through a few images at a time; small ones are made to."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []

        def few(geometry, *rest):
            seen.append(geometry.batch)
            return images

        patch.setattr(unfold, "images_per_chunk", few)
        check_all(c, c.input())
        assert seen


def test_chunks_split_without_being_made_to():
    c = case(8, 16, (24, 24), 5, padding=2)
    expansion = c.geometry.dim * c.geometry.samples / c.geometry.input_numel
    assert 1 <= planned.images_per_chunk(c.geometry, expansion, 1, "cpu") < 8
    parts = unfold.chunks(c.input(), c.geometry, expansion, 1)
    assert sum(g.batch for _, g in parts) == 8
    assert [p.shape[0] for p, _ in parts] == [g.batch for _, g in parts]
    assert planned.images_per_chunk(c.geometry, 1e9, 1, "cpu") == 1
    assert planned.images_per_chunk(c.geometry, 0.1, 1, "cpu") == 8
    small = case(8, 16, (7, 7), 3, padding=1).geometry
    assert planned.images_per_chunk(small, 9, 1, "cpu") == 8  # not worth a second part
    ten = case(10, 64, (56, 56), 3, padding=1).geometry  # one image's patches are 0.9 of the input
    assert planned.images_per_chunk(ten, 9, 1, "cpu") == 1
    for shape in ((0, 3, 8, 8), (0, 3, 3, 9)):
        empty = make_geometry(shape, (3, 3), (1, 1), (1, 1), (1, 1), 1)
        assert all(choice.seconds >= 0 for choice in gram_choices(empty))
    large = case(10, 64, (224, 224), 3, padding=1).geometry
    assert planned.images_per_chunk(large, 2, 2, "cuda") == 10
    assert planned.images_per_chunk(large, 0.4, 2, "cpu") == 3  # 1.3 M elements each, four parts


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=ids)
@pytest.mark.parametrize(
    "c",
    [
        case(2, 2, (12, 12), 3, padding=1),
        case(2, 2, (12, 12), 3),
        case(2, 2, (13, 14), 3, stride=2, padding=1),
        case(2, 1, (12, 12), 5, padding=2),
        case(2, 2, (20,), 4, padding=1, dilation=2),
        case(1, 1, (5, 6, 7), 3, padding=1),
    ],
    ids=str,
)
def test_a_border_that_outweighs_the_interior(c, dtype):
    """Strips are added, never subtracted: an entry that leaves the border out keeps its digits."""
    x = c.input(dtype)
    for axis in range(2, x.dim()):
        x.narrow(axis, 0, 1).mul_(1e5)
        x.narrow(axis, x.shape[axis] - 1, 1).mul_(1e5)
    oracle = reference.patch_gram(x.double(), *c.arguments)
    plain = moment_error(reference.patch_gram(x, *c.arguments), oracle)
    bound = 1e-12 if dtype == F64 else 2 * plain + 1e-6
    for choice in algorithms(c.geometry):
        assert moment_error(eager.patch_gram(x, c.geometry, choice), oracle) <= bound, str(choice)


@pytest.mark.parametrize(
    "c",
    [
        case(2, 3, (8, 9), 3, padding=1),
        case(2, 3, (8, 9), 3, stride=2, padding=1),
        case(2, 3, (8, 9), 5, padding=2),
        case(2, 3, (12,), 3, padding=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("corner", ["first", "last"])
def test_one_infinite_pixel_spoils_only_what_multiplies_it(c, corner):
    x = c.input()
    index = 0 if corner == "first" else -1
    x[(0, 1, *[index] * len(c.size))] = float("inf")
    oracle = reference.patch_gram(x, *c.arguments)[0]
    finite = oracle.isfinite()
    channel = torch.arange(3).repeat_interleave(c.geometry.taps)
    apart = (channel[:, None] != 1) & (channel != 1)
    assert finite[apart].all()
    assert not finite.all()
    for choice, zero_columns in itertools.product(algorithms(c.geometry), (True, False)):
        with thresholds(zero_columns):
            S = eager.patch_gram(x, c.geometry, choice)[0]
        # other channels keep every digit, and what is lost is not hidden
        difference = torch.where(apart, S - oracle, 0.0)
        assert difference.abs().max() <= 1e-12 * oracle[apart].abs().max(), str(choice)
        assert torch.equal(S.diagonal().isfinite(), oracle.diagonal().isfinite()), str(choice)
        # Where zero columns are multiplied by Inf, a few more pairs of taps are lost. Not all of
        # them, as they would be by subtracting.
        kept = (S.isfinite() & finite & ~apart).sum() / (finite & ~apart).sum()
        strict = choice.name != "shift" or not zero_columns
        assert kept == 1 if strict else kept > 0.3, (str(choice), kept)


# --------------------------------------------------------------------------- mean, stats, rows


@settings(max_examples=120)
@given(cases(), layouts, st.sampled_from([F64, *LOW]))
def test_patch_mean(c, layout, dtype):
    x = c.input(dtype, layout=layout)
    oracle = reference.patch_mean(x.double(), *c.arguments)
    m = torch.ops.dbp.patch_mean(x, *c.arguments)
    # against the mean magnitude, below which a mean may cancel
    scale = reference.patch_mean(x.double().abs(), *c.arguments).clamp_min(1e-300)
    errors = ((m.double() - oracle).abs() / scale).max().item()
    plain = reference.patch_mean(x, *c.arguments).double()
    bound = 1e-12 if dtype == F64 else 2 * ((plain - oracle).abs() / scale).max().item() + 1e-6
    assert errors <= bound
    assert m.dtype == (F64 if dtype == F64 else torch.float32)


@settings(max_examples=60)
@given(cases(), layouts)
def test_rows_are_patches(c, layout):
    x = c.input(layout=layout)
    z = unfold.rows(x, c.geometry)
    oracle = reference.patches(x, *c.arguments)
    assert z.shape == oracle.shape
    # the order of the rows is free; their multiset is not
    assert torch.equal(z.sort(1).values, oracle.sort(1).values)
    assert moment_error(z.mT @ z, oracle.mT @ oracle) <= 1e-12


@settings(max_examples=60)
@given(cases(), layouts, st.sampled_from([F64, *LOW]), st.booleans())
def test_decor_stats(c, layout, dtype, flat):
    x = c.input(dtype, layout=layout)
    R = c.R(F64 if dtype == F64 else torch.float32, flat=flat)
    C, V = torch.ops.dbp.decor_stats(x, R, *c.arguments)
    expected = reference.decor_stats(x.double(), R.double(), *c.arguments)
    scale = 1 + expected[1].abs().max().item()
    plain = reference.decor_stats(x.to(R.dtype), R, *c.arguments)
    for ours, oracle, other in zip((C, V), expected, plain):
        assert ours.shape == oracle.shape
        assert ours.dtype == R.dtype
        slack = 1e-12 if dtype == F64 else 1e-6
        other_error = (other.double() - oracle).abs().max().item()
        assert (ours.double() - oracle).abs().max().item() <= 2 * other_error + slack * scale
    assert not C.diagonal(dim1=-2, dim2=-1).any()


# --------------------------------------------------------------------------- updates


def forced(c) -> list[Choice]:
    """Every plan, "gram" once for each algorithm, "samples" also where it is not offered."""
    grams = [Choice("gram", 0.0, 0.0, gram=a) for a in algorithms(c.geometry)]
    return [*grams, Choice("direct", 0.0, 0.0), Choice("samples", 0.0, 0.0)]


@settings(max_examples=80)
@given(
    st.one_of(
        cases(),
        st.builds(
            lambda n, d, g: rows((n, d * g), g),
            st.integers(1, 9),
            st.integers(1, 9),
            st.integers(1, 3),
        ),
    ),
    layouts,
    st.sampled_from(["standard", "normalized"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_plan_is_the_same_update(c, layout, rule, kappa, demean, seed):
    x, R = c.input(seed=seed, layout=layout), c.R(seed=seed + 1)
    rest = (0.5, kappa, rule, demean)
    expected, loss = reference.decor_update(x, R, *c.arguments, *rest)
    scale = 1 + reference.decor_stats(x, R, *c.arguments)[1].abs().max().item() ** 2
    for choice in forced(c):
        R_new, losses = updated(eager, x, R, c.geometry, *rest, choice)
        assert error(R_new, expected) <= 1e-10, str(choice)
        assert abs(losses.mean().item() - loss.item()) <= 1e-10 * scale, str(choice)
    flat = R[0] if c.groups == 1 else R
    R_new, op_loss = torch.ops.dbp.decor_update(x, flat, *c.arguments, *rest)
    assert R_new.shape == flat.shape
    assert error(R_new.reshape(R.shape), expected) <= 1e-10
    assert op_loss.shape == ()
    assert abs(op_loss.item() - loss.item()) <= 1e-10 * scale


@pytest.mark.parametrize("dtype", LOW, ids=ids)
@pytest.mark.parametrize(
    "c", [case(4, 8, (9, 9), 3, padding=1), case(1, 16, (3, 3), 3, padding=1), rows((16, 48))]
)
@pytest.mark.parametrize("demean", [False, True])
def test_update_in_low_precision(c, dtype, demean):
    x, R = c.input(dtype), c.R(torch.float32)
    rest = (0.5, 0.5, "standard", demean)
    expected, loss = reference.decor_update(x.double(), R.double(), *c.arguments, *rest)
    plain, plain_loss = reference.decor_update(x.float(), R, *c.arguments, *rest)
    for choice in update_choices(c.geometry):
        R_new, losses = updated(eager, x, R, c.geometry, *rest, choice)
        assert R_new.dtype == torch.float32
        assert error(R_new, expected) <= 2 * error(plain, expected) + 1e-6
        relative = abs(losses.mean().item() / loss.item() - 1)
        assert relative <= 2 * abs(plain_loss.item() / loss.item() - 1) + 1e-6


def test_forced_choices_reach_the_algorithm_they_name(monkeypatch):
    """Otherwise the tests above might compare one algorithm with itself."""
    called = []
    for name in ("patch_gram_shift", "patch_gram_self_wgrad", "patch_gram_unfold"):
        function = getattr(eager, name)
        monkeypatch.setattr(
            eager, name, lambda *a, f=function, n=name: (called.append((n, a[2:])), f(*a))[1]
        )
    c = case(1, 2, (6, 6), 3, padding=1)
    for choice in algorithms(c.geometry):
        called.clear()
        eager.patch_gram(c.input(), c.geometry, choice)
        ((name, rest),) = called
        assert name == f"patch_gram_{choice.name}"
        if choice.name == "shift":
            assert rest == (choice.unfolded,)


# --------------------------------------------------------------------------- the shift program


def _place(indices, sizes) -> int:
    """Row-major."""
    place = 0
    for index, size in zip(indices, sizes, strict=True):
        place = place * size + index
    return place


@settings(max_examples=100)
@given(cases())
def test_each_product_is_computed_once(c):
    """Of a combination of classes and its transpose, exactly one is in the program."""
    program = planned.make_program(c.geometry.axes)
    seen = {
        (tuple(k.key for k in band.inner), p.row.key, band.segments, p.segment)
        for band in program.bands
        for p in band.products
    }
    assert len(seen) == sum(len(band.products) for band in program.bands)
    classes = {(inner, row) for inner, row, _, _ in seen}
    for inner, row in classes:
        transposed = (
            tuple((right, left, -shift) for left, right, shift in inner),
            (row[1], row[0], -row[2]),
        )
        assert transposed == (inner, row) or transposed not in classes
    used = set()
    for band in program.bands:
        for p in band.products:
            places = itertools.product(*(range(*covered) for covered in p.covering))
            used |= {p.block + _place(place, p.windows) for place in places}
            for k, segment, covered in zip(
                (*band.inner, p.row), (*band.segments, p.segment), p.covering, strict=True
            ):
                inside = [a <= segment[0] and segment[1] <= b for a, b in k.windows]
                assert inside == [i in range(*covered) for i in range(len(k.windows))]
    assert used == set(range(program.blocks))
    assert len(program.source_of) == c.geometry.taps**2
    numbers = set(program.source_of)
    assert set(range(program.sources - 1)) <= numbers <= set(range(program.sources))


def test_thirteen_products_for_a_three_by_three_kernel():
    program = planned.make_program(case(1, 1, (9, 9), 3, padding=1).geometry.axes)
    combinations = {
        (tuple(k.key for k in band.inner), p.row.key)
        for band in program.bands
        for p in band.products
    }
    assert len(combinations) == 13


# --------------------------------------------------------------------------- products


@pytest.mark.parametrize("count", [1, 3, 4])
def test_mirror_on_cuda_copies_a_panel_at_a_time(count):
    out = random((2, 777, 777), F64)
    expected = out.clone()
    matmul.mirror(expected, count)
    copies = []

    class OnCuda:
        """Looks like a tensor there."""

        is_cuda, shape = True, out.shape

        def __getitem__(self, index):
            return out[index]

        def __setitem__(self, index, value):
            copies.append(index)
            out[index] = value

    matmul.mirror(OnCuda(), count)
    assert torch.equal(out, expected)
    assert len(copies) == count - 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("n", "dim"), [(4, 5), (300, 513), (300, 777), (2500, 7), (2048, 3)])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=ids)
def test_products(n, dim, groups, dtype):
    x, y = random((groups, n, dim), dtype), random((groups, n, dim + 2), dtype, seed=1)
    xx, xy = x.double().mT @ x.double(), x.double().mT @ y.double()
    plain = max(error(x.mT @ x, xx), error(x.mT @ y, xy))
    tolerance = 1e-14 if dtype == F64 else 2 * plain + 1e-6
    for count in (1, planned.panels(dim, n)):
        out = torch.empty(groups, dim, dim, dtype=dtype)
        for times in (1, 2):
            matmul.upper_product(x, x, out, times > 1, count)
            matmul.mirror(out, count)
            assert error(out, times * xx) < tolerance
    assert error(matmul.symmetric_product(x, x, alpha=0.5), 0.5 * xx) < tolerance
    out = torch.empty(groups, dim, dim + 2, dtype=dtype)
    for times in (1, 2):
        matmul.product(x, y, out, times > 1)
        assert error(out, times * xy) < tolerance


def test_wide_and_tall_products_are_cut_in_panels():
    assert planned.panels(512, 10_000) > 1
    assert planned.panels(64, 10_000) == planned.panels(512, 10) == 1
    # calls on a GPU cost more than small products
    assert planned.panels(1152, 10_000, cuda=True) == 1
    assert planned.panels(4608, 10_000, cuda=True) == 4


@pytest.mark.parametrize("rows", [0, 1, 10, 32, 33])
@pytest.mark.parametrize("dim", [16, 24, 20])
def test_few_rows_times_a_large_matrix(rows, dim, monkeypatch):
    monkeypatch.setattr(rows_times, "_LARGE", 20)
    monkeypatch.setattr(rows_times, "_PART", 8)
    X, R = random((rows, dim), F64), random((dim, dim), F64)
    used = []
    plain = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: used.append(len(x)) or plain(x, y))
    torch.testing.assert_close(rows_times.rows_times(X, R), X @ R)
    assert used == ([3] if rows <= 32 and dim == 24 else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_not_rounded(dtype, monkeypatch):
    monkeypatch.setattr(rows_times, "_LARGE", 64)
    monkeypatch.setattr(rows_times, "_PART", 8)
    X, R = random((10, 1024), dtype), 1 + 0.1 * random((1024, 1024), dtype, seed=1)
    X = X - X.mean(1, keepdim=True)
    exact = X.double() @ R.double()
    assert error(rows_times.rows_times(X, R), exact) <= 2 * error(X @ R, exact) + 1e-6


GAIN = ((16, 100.0),), ((16, 130.0),)  # BLAS's and oneDNN's rates


@pytest.fixture
def by_onednn(monkeypatch):
    """Products by oneDNN, whatever this machine's calibration says; lists their shapes."""
    if not onednn.available():
        pytest.skip("this build of torch lacks oneDNN's products")
    gained = replace(machine("cpu"), narrow=GAIN[0], onednn=GAIN[1])
    monkeypatch.setattr(onednn, "machine", lambda device_type: gained)
    for floor in ("ONEDNN_WORTH", "_ROWS", "_COPIED_FOR"):
        monkeypatch.setattr(onednn, floor, 0)
    calls = []
    product = onednn.product

    def listed(X, Y):
        calls.append((*X.shape, Y.shape[1]))
        return product(X, Y)

    monkeypatch.setattr(onednn, "product", listed)
    return calls


def matrix(rows, columns, layout, seed):
    """(1, rows, columns) of float32."""
    if layout == "transposed":
        return random((1, columns, rows), torch.float32, seed=seed).mT
    if layout == "overlapping":
        values = random((2 * rows + columns + 1,), torch.float32, seed=seed)
        return values.as_strided((1, rows, columns), (1, 2, 1))
    if layout == "expanded":
        return random((1, 1, columns), torch.float32, seed=seed).expand(1, rows, columns)
    wide = random((1, rows, 2 * columns), torch.float32, seed=seed)
    parts = {"dense": wide[..., :columns].contiguous(), "cut": wide[..., :columns]}
    return parts.get(layout, wide[..., ::2])


MATRIX_LAYOUTS = ("dense", "transposed", "cut", "spaced", "overlapping", "expanded")


@pytest.mark.parametrize("layout_X", MATRIX_LAYOUTS)
@pytest.mark.parametrize("layout_Y", MATRIX_LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes", [(5, 40, 7), (9, 2048, 12), (9, 5000, 4), (1, 1, 1), (0, 4, 3), (3, 0, 4)]
)
def test_products_by_onednn(sizes, layout_X, layout_Y, transposed, by_onednn):
    a, n, b = sizes
    X = matrix(a, n, layout_X, 0)
    Y = matrix(b, n, layout_Y, 1).mT if transposed else matrix(n, b, layout_Y, 1)
    exact = X.double() @ Y.double()
    found = matmul.matmul(X, Y)
    assert found.shape == exact.shape
    assert by_onednn == [sizes]
    assert error(found, exact) <= 2 * error(X @ Y, exact) + 1e-6


@pytest.mark.parametrize("rows", [3, 4, 32, 33, 300])
@pytest.mark.parametrize("dim", [64, 2048, 2049])
def test_rows_times_R_by_onednn(rows, dim, by_onednn, monkeypatch):
    """A = W R and its gradients, the second ones too; where copies would not pay, by BLAS."""
    monkeypatch.setattr(onednn, "_ROWS", 4)
    monkeypatch.setattr(onednn, "_COPIED_FOR", 256)
    X, R = random((rows, dim), torch.float32), random((dim, dim), torch.float32, seed=1)
    one_part = dim <= 2048
    forward = rows >= 4 and (one_part or rows > 32)
    backward = forward and (one_part or rows >= 256)

    def results(multiply, X, R):
        X, R = X.clone().requires_grad_(), R.clone().requires_grad_()
        out = multiply(X, R)
        first = torch.autograd.grad(out.square().sum(), X, retain_graph=True)
        seen = len(by_onednn)
        gradients = torch.autograd.grad(out.square().sum(), (X, R), create_graph=True)
        return out, *first, *torch.autograd.grad(gradients[0].square().sum(), (X, R)), seen

    *found, seen = results(rows_times.rows_times, X, R)
    assert by_onednn[:seen] == [(rows, dim, dim)] * (forward + backward)
    *exact, _ = results(torch.mm, X.double(), R.double())
    *blas, _ = results(torch.mm, X, R)
    for ours, plain, oracle in zip(found, blas, exact):
        assert ours.shape == oracle.shape
        assert ours.is_contiguous()
        assert error(ours, oracle) <= 2 * error(plain, oracle) + 1e-6


@pytest.mark.parametrize("of_X", [False, True])
@pytest.mark.parametrize("of_R", [False, True])
def test_rows_times_R_keeps_what_mm_keeps(of_X, of_R, by_onednn):
    """Whatever may be done to a weight between the passes, memory and checkpoints depend on it."""
    X, R = random((4, 8), torch.float32), random((8, 8), torch.float32, seed=1)
    X.requires_grad_(of_X), R.requires_grad_(of_R)

    def kept(multiply):
        tensors = []
        hooks = torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda packed: packed)
        with hooks:
            multiply(X, R)
        return [id(tensor) for tensor in tensors]

    assert kept(rows_times.rows_times) == kept(torch.mm)
    assert by_onednn == [(4, 8, 8)]


def test_a_batch_of_gradients_is_not_for_onednn(by_onednn):
    X, R = (random((300, 300), torch.float32, seed=seed) for seed in (0, 1))
    gradients = random((2, 300, 300), torch.float32, seed=2)
    X.requires_grad_()
    out = rows_times.rows_times(X, R)
    (found,) = torch.autograd.grad(out, X, gradients, is_grads_batched=True)
    torch.testing.assert_close(found, gradients @ R.mT)
    assert len(by_onednn) == 1


def test_small_products_are_not_worth_onednn(by_onednn, monkeypatch):
    monkeypatch.setattr(onednn, "ONEDNN_WORTH", 4 * 64 * 64)
    X, R = random((1, 4, 64), torch.float32), random((1, 64, 64), torch.float32)
    for count in (3, 4):
        matmul.matmul(X[:, :count], R)
        rows_times.rows_times(X[0, :count], R[0])
    assert by_onednn == [(4, 64, 64)] * 2


@pytest.mark.parametrize(
    ("shape_X", "shape_Y", "transposed", "pays"),
    [
        ((3, 64), (64, 64), False, False),
        ((64, 64), (64, 3), False, False),
        ((4, 64), (64, 4), False, True),
        # parts of more than 2048 terms: of X always, of Y where its columns are dense
        ((4, 2048), (2048, 300), True, True),
        ((4, 2049), (2049, 300), True, False),
        ((4, 2049), (2049, 300), False, True),
        ((300, 2049), (2049, 300), True, True),
        ((300, 2049), (2049, 4), False, False),
    ],
)
@pytest.mark.usefixtures("by_onednn")
def test_what_onednn_multiplies(shape_X, shape_Y, transposed, pays, monkeypatch):
    monkeypatch.setattr(onednn, "_ROWS", 4)
    monkeypatch.setattr(onednn, "_COPIED_FOR", 256)
    X, Y = random(shape_X, torch.float32), random(shape_Y, torch.float32)
    Y = Y.mT.contiguous().mT if transposed else Y
    assert onednn.faster(X, Y, recorded=False) == pays


@pytest.mark.parametrize(
    ("plan", "n", "shapes"),
    [
        # the products of R S, the panels of (R S) R^T, and M' R
        ("gram", 9, [(400, 400, 400)] + [(k, 400, 200) for k in (200, 400)] + [(400, 400, 400)]),
        # R Z^T, X^T X, M' R
        ("direct", 9, [(400, 400, 9), (400, 9, 400), (400, 400, 400)]),
        ("direct", 700, [(400, 400, 700)] + [(k, 700, 200) for k in (200, 400)] + [(400,) * 3]),
        # Z R^T, X X^T, X R; R itself is changed in place
        ("samples", 9, [(9, 400, 400), (9, 400, 9), (9, 400, 400)]),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_updates_by_onednn(plan, n, shapes, groups, kappa, by_onednn):
    dim = 400
    Z = random((groups, n, dim), torch.float32)
    R = torch.eye(dim) + 0.05 * random((groups, dim, dim), torch.float32, seed=1)
    S = Z.mT @ Z / n
    before = R.clone(), S.clone(), Z.clone()
    call = {
        "gram": lambda z, s, r: rules.update_from_gram(s, r, 1e-2, kappa),
        "direct": lambda z, s, r: rules.update_direct(z, r, 1e-2, kappa),
        "samples": lambda z, s, r: rules.update_from_samples(z, r, 1e-2, kappa),
    }[plan]
    exact = call(Z.double(), S.double(), R.double())
    assert not by_onednn  # float64 is not its business
    found = call(Z, S, R)
    assert by_onednn == (shapes if groups == 1 else [])
    by_onednn.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        plain = call(Z, S, R)
    assert not by_onednn
    for ours, theirs, oracle in zip(found, plain, exact):
        assert error(ours, oracle) <= 2 * error(theirs, oracle) + 1e-6
    assert all(map(torch.equal, before, (R, S, Z)))
    if plan == "gram":
        overwritten = rules.update_from_gram(S, R, 1e-2, kappa, overwrite=True)
        assert all(map(torch.equal, overwritten, found))
        assert torch.equal(R, before[0])


@pytest.mark.usefixtures("by_onednn")
def test_updates_by_onednn_of_overlapping_windows_and_without_a_step():
    x = random((4000,), torch.float32).unfold(0, 32, 2)[:200]
    R = torch.eye(32)
    found = dbp.decor_update(x, R, (), lr=1e-2)
    expected = dbp.decor_update(x.contiguous().double(), R.double(), (), lr=1e-2)
    assert error(found[0], expected[0]) < 1e-6
    x = x.clone()
    x[0, 0] = float("inf")
    assert torch.equal(dbp.decor_update(x, R, (), lr=0.0)[0], R)


def test_onednn_multiplies_float32_where_the_calibration_says_so(by_onednn, monkeypatch):
    X, Y = random((1, 4, 5), torch.float32), random((1, 5, 6), torch.float32)
    assert onednn.faster(X, Y)
    assert not onednn.faster(X.double(), Y.double())
    assert not onednn.faster(X.to("meta"), Y.to("meta"))
    assert not onednn.faster(X.expand(2, -1, -1), Y.expand(2, -1, -1))
    asking = Y.clone().requires_grad_()
    assert not onednn.faster(X, asking)
    matmul.matmul(X, asking).sum().backward()
    assert asking.grad is not None
    with torch.no_grad():
        assert onednn.faster(X, asking)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.faster(X, Y)
    monkeypatch.setattr(onednn, "_AVAILABLE", False)
    assert not onednn.faster(X, Y)
    monkeypatch.setattr(onednn, "_AVAILABLE", True)
    for rates in ((), ((16, 90.0),), ((16, 101.0),)):
        slower = replace(machine("cpu"), narrow=GAIN[0], onednn=rates)
        monkeypatch.setattr(onednn, "machine", lambda device_type, slower=slower: slower)
        assert not onednn.faster(X, Y)


def test_another_signature_of_the_operator_is_no_signature(monkeypatch):
    monkeypatch.setattr(onednn, "_ARGUMENTS", ["Tensor"])
    assert not onednn.available()


# --------------------------------------------------------------------------- precision settings


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_left_alone(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        c = case(2, 4, (6, 6), 3, padding=1)
        for choice in forced(c):
            updated(eager, c.input(), c.R(), c.geometry, 0.1, 0.5, "standard", True, choice)
        dbp.patch_gram(c.input(), 3, padding=1)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
