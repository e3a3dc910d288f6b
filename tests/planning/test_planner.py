"""The planner's choices: sane, reproducible, and right where the answer is known."""

import itertools
from dataclasses import replace

import pytest
from helpers import case, cases, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.planning import calibration, planner
from dbp_kernels.planning.choice import PLANS, PRECISIONS, STATISTICS
from dbp_kernels.planning.planner import ALGORITHMS, gram_choices, stats_choices, update_choices


@settings(max_examples=100)
@given(
    cases(),
    st.sampled_from(["cpu", "cuda", "something else"]),
    st.sampled_from([4, 8]),
    st.sampled_from(["eager", "triton", "cuda"]),
    st.sampled_from(PRECISIONS),
    st.booleans(),
)
def test_choices_are_sound(c, device, itemsize, backend, precision, sm90):
    where = (device, itemsize, backend, precision)
    for choices, names in (
        (gram_choices(c.geometry, *where, sm90=sm90), ALGORITHMS),
        (update_choices(c.geometry, *where, sm90=sm90), PLANS),
        (stats_choices(c.geometry, *where, sm90=sm90), STATISTICS),
    ):
        assert choices
        for choice in choices:
            assert choice.name in names
            assert choice.gflop >= 0  # none if every tap reads padding
            assert choice.seconds > 0
            assert str(choice).startswith(choice.name)
            if choice.name == "shift":
                assert len(choice.unfolded) == len(c.geometry.axes)
                assert not all(choice.unfolded)
            if choice.name == "gram":
                assert choice.gram == gram_choices(c.geometry, *where, sm90=sm90)[0]
                assert choice.gflop > choice.gram.gflop
        keys = [(choice.name, choice.unfolded) for choice in choices]
        assert len(set(keys)) == len(keys)
        seconds = [choice.seconds for choice in choices]
        assert seconds == sorted(seconds)


@settings(max_examples=100)
@given(cases())
def test_deterministic(c):
    first = gram_choices(c.geometry), update_choices(c.geometry)
    gram_choices.cache_clear()
    update_choices.cache_clear()
    assert (gram_choices(c.geometry), update_choices(c.geometry)) == first


@settings(max_examples=100)
@given(cases())
def test_samples_only_where_its_loss_keeps_its_digits(c):
    offered = {choice.name for choice in update_choices(c.geometry)}
    assert {"gram", "direct"} <= offered
    assert ("samples" in offered) == (c.geometry.samples <= c.geometry.dim)


def gram(*arguments, **named) -> str:
    return gram_choices(case(*arguments, **named).geometry)[0].name


def plan(c) -> str:
    return update_choices(c.geometry)[0].name


@pytest.mark.parametrize(
    ("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)], ids=lambda v: str(v)
)
def test_three_by_three_convolutions_are_shifted(channels, size):
    choice = gram_choices(case(32, channels, (size, size), 3, padding=1).geometry)[0]
    assert (choice.name, any(choice.unfolded)) == ("shift", False)


def test_five_by_five_convolutions_are_shifted():
    assert gram(16, 64, (27, 27), 5, padding=2) == "shift"


@pytest.mark.parametrize(("channels", "size"), [(64, 56), (2048, 7)], ids=lambda v: str(v))
def test_pointwise_convolutions_are_plain_products(channels, size):
    g = case(8, channels, (size, size), 1).geometry
    assert [choice.name for choice in gram_choices(g)] == ["unfold"]
    strided = case(8, channels, (size, size), 1, stride=2).geometry
    assert gram_choices(strided)[0].name == "unfold"


def test_linear():
    assert [c.name for c in gram_choices(rows((128, 784)).geometry)] == ["unfold"]
    assert plan(rows((16, 784))) in ("samples", "direct")  # n << D
    assert plan(rows((100_000, 64))) == "gram"  # n >> D: never touch the samples twice


def test_late_layers_with_few_samples_do_not_form_S():
    assert plan(case(3, 512, (7, 7), 3, padding=1)) in ("samples", "direct")


def test_early_layers_form_S():
    assert plan(case(32, 64, (56, 56), 3, padding=1)) == "gram"


def test_shift_costs_what_it_should():
    """13 distinct products in place of 81, one of them symmetric: about 6.5 times fewer."""
    choices = gram_choices(case(32, 64, (56, 56), 3, padding=1).geometry)
    shift = next(c for c in choices if c.name == "shift" and not any(c.unfolded))
    full = 2 * 32 * 56**2 * (9 * 64) ** 2 / 1e9
    assert 5.8 < full / shift.gflop < 6.6


@settings(max_examples=100)
@given(cases())
def test_each_backend_has_its_own_algorithms(c):
    names = {choice.name for choice in gram_choices(c.geometry, "cuda", 4, "triton", "bf16")}
    assert "triton_direct" in names
    assert ("triton_shift" in names) == (not c.geometry.pointwise)
    assert not any("triton" in choice.name for choice in gram_choices(c.geometry, "cuda", 4))


@settings(max_examples=100)
@given(
    cases(),
    st.sampled_from(["eager", "triton", "cuda"]),
    st.sampled_from(PRECISIONS),
    st.booleans(),
)
def test_kernels_of_capability_9_0_are_offered_where_they_run(c, backend, precision, sm90):
    offered = gram_choices(c.geometry, "cuda", 4, backend, precision, sm90=sm90)
    covered = precision in ("bf16", "fp16") and set(c.stride) <= {1}
    names = [choice.name for choice in offered]
    assert names.count("cuda_sm90") == (backend == "cuda" and sm90 and covered)


@pytest.mark.parametrize("c", [case(26, 64, (28, 28), 3, padding=1), case(26, 64, (28, 28), 1)])
def test_kernels_of_capability_9_0_have_a_figure_of_their_own(c, machines):
    def seconds(**figures) -> dict[str, float]:
        machines(**figures)
        return {
            x.name: x.seconds
            for x in gram_choices(c.geometry, "cuda", 4, "cuda", "bf16", sm90=True)
        }

    kernels = ((64, 0.3), (128, 0.3))
    plain = seconds(kernels=kernels)
    fast, slow = (seconds(kernels=kernels, sm90=((64, r), (128, r))) for r in (0.6, 0.1))
    assert fast["cuda_sm90"] < plain["cuda_sm90"] < slow["cuda_sm90"]
    for times in (fast, slow):
        assert {name for name in plain if times[name] != plain[name]} == {"cuda_sm90"}


@pytest.mark.parametrize(
    ("channels", "size"), [(64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14)]
)
def test_on_a_GPU_one_launch_beats_a_library_product_of_pixels(channels, size):
    """A library's product takes the host longer than either takes the GPU."""
    g = case(26, channels, (size, size), 1).geometry
    assert gram_choices(g, "cuda", 4, "triton", "bf16")[0].name == "triton_direct"
    # nor is it cut into panels, each of which would be a product
    (alone,) = gram_choices(g, "cuda", 4, "eager", "bf16")
    assert alone.gflop == pytest.approx(2 * g.samples * g.dim**2 / 1e9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_half_precision_is_read_faster(kernel):
    """Kernels read the input itself, not a float32 copy."""
    g = case(26, 64, (28, 28), kernel).geometry
    machines = {p: replace(calibration.machine("cuda"), speed=1.0) for p in ("bf16", "tf32")}
    for cost in (planner._kernel_direct_cost, planner._kernel_shift_cost):
        half, full = (cost(g, m, 4, "triton", p).seconds for p, m in machines.items())
        assert half < full


def test_small_patches_are_decorrelated_in_one_kernel():
    few, many = case(26, 3, (32, 32), 3, padding=1), case(32, 128, (28, 28), 3, padding=1)
    best = {
        c: stats_choices(c.geometry, "cuda", 4, "triton", "bf16", "tf32")[0] for c in (few, many)
    }
    assert (best[few].name, best[many].name) == ("fused", "gram")
    assert "fused" not in {c.name for c in stats_choices(few.geometry)}


def test_the_triton_shift_form_needs_as_few_operations():
    """No zero columns, no pixel twice: at most the library's shift form's."""
    g = case(32, 128, (28, 28), 3, padding=1).geometry
    flop = {c.name: c.gflop for c in reversed(gram_choices(g, "cuda", 4, "triton", "bf16"))}
    full = 2 * 32 * 28**2 * (9 * 128) ** 2 / 1e9
    assert flop["triton_shift"] < flop["shift"]
    assert 5.8 < full / flop["triton_shift"] < 8
    assert full / flop["triton_direct"] == pytest.approx(2, rel=0.15)


def test_more_work_costs_more():
    for choices, factor in itertools.product((gram_choices, update_choices), (2, 16)):
        small = case(4, 32, (28, 28), 3, padding=1).geometry
        large = small.with_batch(4 * factor)
        for name in {c.name for c in choices(small)} & {c.name for c in choices(large)}:
            cost = [min(c.seconds for c in choices(g) if c.name == name) for g in (small, large)]
            assert cost[0] < cost[1]


# --- what the figures of a device do to the choices; test_calibration.py tests the files themselves


@pytest.fixture
def machines(monkeypatch):
    """Makes the planner reckon with given figures, as changes of the CPU's."""
    own = calibration.machine("cpu")

    def use(**changes) -> None:
        monkeypatch.undo()
        planner.reset()
        given = replace(own, **changes)
        monkeypatch.setattr(planner, "machine", lambda *arguments: given)

    use.own = own
    yield use
    monkeypatch.undo()
    planner.reset()


TABLES = ("pack", "pack_strided", "pack_thin", "pack_stem")  # three each, by elements
PATCHES = ("im2col", "im2col_strided")


def times(factor: float, points):
    """Points, or several lists of them, with other costs."""
    if isinstance(points[0][0], tuple):
        return tuple(times(factor, table) for table in points)
    return tuple((elements, factor * cost) for elements, cost in points)


SPREAD = (
    case(32, 64, (56, 56), 3, padding=1),
    case(32, 3, (224, 224), 7, stride=2, padding=3),
    case(32, 256, (14, 14), 3, stride=2, padding=1),
    case(8, 128, (56, 56), 3, padding=1, groups=32),
    rows((100, 512)),
)


def test_a_device_twice_as_fast_in_all_halves_every_cost(machines):
    """So no figure enters with a wrong dimension."""
    before = [(gram_choices(c.geometry), update_choices(c.geometry)) for c in SPREAD]
    own = machines.own
    numbers = ("call", "product_call", "shift_call", "unfold_call", "fresh", "wgrad_weight")
    halves = {k: getattr(own, k) / 2 for k in numbers}
    halves |= {k: times(0.5, getattr(own, k)) for k in (*TABLES, *PATCHES)}
    halves |= {k: tuple(v / 2 for v in getattr(own, k)) for k in ("assemble", "plan_call")}
    machines(speed=2, gbytes=2 * own.gbytes, **halves)
    for c, (grams, updates) in zip(SPREAD, before):
        for old, new in ((grams, gram_choices(c.geometry)), (updates, update_choices(c.geometry))):
            assert [str(choice) for choice in old] == [str(choice) for choice in new]
            assert [o.seconds for o in old] == pytest.approx([2 * n.seconds for n in new])


def test_each_copy_costs_those_that_make_it(machines):
    g = SPREAD[0].geometry
    before = {str(c): c.seconds for c in gram_choices(g)}
    own = machines.own
    last, other = "shift[unfold axis 1]", "shift[unfold axis 0]"
    for figure, payers in (
        ({"im2col": times(9, own.im2col)}, {"unfold"}),
        ({"pack": (times(9, own.pack[0]), *own.pack[1:])}, {"shift"}),
        ({"pack": (own.pack[0], times(9, own.pack[1]), own.pack[2])}, {last}),
        ({"assemble": (*own.assemble[:2], 9 * own.assemble[2])}, {other}),
        ({"wgrad": tuple((c, r / 9) for c, r in own.wgrad)}, {"self_wgrad"}),
        ({"wgrad_weight": 9 + own.wgrad_weight}, {"self_wgrad"}),
        ({"product_call": 9 * own.product_call}, {"shift", last, other}),
        ({"shift_call": 9 * own.shift_call}, {"shift", last, other}),
        ({"unfold_call": 9 * own.unfold_call}, {"unfold"}),
    ):
        machines(**figure)
        after = {str(c): c.seconds for c in gram_choices(g)}
        assert {name for name in after if after[name] > before[name]} == payers, figure


def test_without_the_cost_of_calls_and_copies_the_fewest_operations_win(machines):
    free = dict.fromkeys(("call", "product_call", "shift_call", "unfold_call"), 1e-15)
    free |= {"fresh": 1e-9, "gbytes": 1e12}
    free |= dict.fromkeys(PATCHES, ((1, 1e-9),)) | dict.fromkeys(TABLES, (((1, 1e-9),),) * 3)
    free["assemble"] = (1e-9,) * 3
    flat = dict.fromkeys(("product", "grouped", "narrow", "wgrad"), ((1, 100.0),))
    machines(**free, **flat)
    for c in SPREAD:
        choices = gram_choices(c.geometry)
        assert choices[0].gflop == min(choice.gflop for choice in choices)


@pytest.mark.parametrize(("features", "pays"), [(512, False), (1024, True)])
def test_only_large_products_have_the_rates_of_onednn(features, pays, machines):
    """16 x 512 x 512 multiply-adds are too few for it."""
    g = rows((16, features)).geometry
    seconds = []
    for rate in (200.0, 400.0):
        machines(narrow=((4, 50.0),), onednn=((4, rate),))
        seconds.append({choice.name: choice.seconds for choice in update_choices(g)}["samples"])
    assert (seconds[1] < seconds[0]) == pays


def test_strides_and_cache_conflicts_make_packing_dearer(machines):
    plain, aliased = (case(16, 64, (s, s), 3, padding=1).geometry for s in (31, 32))
    strided = case(16, 64, (31, 31), 3, stride=2, padding=1).geometry
    tables, dear = machines.own.pack_strided, times(3, machines.own.pack_strided[0])
    for geometry, usual, dearer, payers in (
        (strided, {}, {"pack_strided": (dear, *tables[1:])}, {"shift"}),
        (strided, {}, {"im2col_strided": times(3, machines.own.im2col_strided)}, {"unfold"}),
        (aliased, {"aliased": (1.0, 1.0, 1.0)}, {"aliased": (3.0, 1.0, 1.0)}, {"shift"}),
    ):
        machines(**usual)
        before = {str(c): c.seconds for c in gram_choices(geometry)}
        unaffected = gram_choices(plain)
        machines(**dearer)
        after = {str(c): c.seconds for c in gram_choices(geometry)}
        assert {n for n in before if after[n] > before[n]} == payers
        assert gram_choices(plain) == unaffected


def test_an_element_of_a_large_copy_costs_more(machines):
    g = SPREAD[0].geometry
    machines(im2col=((1000, 1.0), (2000, 1.0)))
    cheap = {str(c): c.seconds for c in gram_choices(g)}["unfold"]
    machines(im2col=((1000, 1.0), (2000, 3.0)))  # constant beyond either end
    dear = {str(c): c.seconds for c in gram_choices(g)}["unfold"]
    assert dear - cheap == pytest.approx(2e-9 * g.samples * g.dim)


def test_no_weight_gradient_of_a_huge_window():
    """21x21 weights took 15 times what their operations do in 5x5 ones."""
    choices = gram_choices(case(8, 32, (28, 28), 11, padding=5).geometry)
    cost = {choice.name: choice.seconds for choice in choices}
    assert cost["self_wgrad"] > 5 * choices[0].seconds
