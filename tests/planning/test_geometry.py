"""Geometry against enumeration: phases, shifts, windows, segments, sizes, bad arguments."""

import itertools

import pytest
import torch
from helpers import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.planning.geometry import Axis, ConvGeometry, cut, make_geometry, same_padding

CONV = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}

axes = st.builds(
    Axis,
    size=st.integers(1, 14),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 9),
    dilation=st.integers(1, 4),
).filter(lambda axis: axis.output >= 1)


def coordinate(axis: Axis, position: int, tap: int) -> int:
    """The definition."""
    return axis.stride * position + axis.dilation * tap - axis.padding


@settings(max_examples=300)
@given(axes)
def test_taps_are_phases_and_shifts(axis):
    for k in range(axis.kernel):
        phase, shift = axis.tap(k)
        assert 0 <= phase < axis.stride
        for p in range(axis.output):
            assert coordinate(axis, p, k) == axis.stride * (p + shift) + phase
    assert axis.phases == tuple(sorted({axis.tap(k)[0] for k in range(axis.kernel)}))


@settings(max_examples=300)
@given(axes)
def test_lattices_and_valid_positions(axis):
    for phase in range(axis.stride):
        assert axis.lattice(phase) == len(range(phase, axis.size, axis.stride))
    for k in range(axis.kernel):
        inside = [p for p in range(axis.output) if 0 <= coordinate(axis, p, k) < axis.size]
        assert list(range(*axis.valid(k))) == inside


@settings(max_examples=300)
@given(axes)
def test_pair_classes(axis):
    """Every pair of taps that multiplies any pixels is in one class, with its exact window."""
    found = {}
    for c in axis.pair_classes:
        assert len(set(c.windows)) == len(c.windows)
        assert set(c.window_of.values()) == set(range(len(c.windows)))
        for pair, window in c.window_of.items():
            assert pair not in found
            found[pair] = c
            left, right = pair
            products = [
                (coordinate(axis, p, left), coordinate(axis, p, right))
                for p in range(axis.output)
                if 0 <= coordinate(axis, p, left) < axis.size
                and 0 <= coordinate(axis, p, right) < axis.size
            ]
            claimed = [
                (axis.stride * i + c.phase_left, axis.stride * (i + c.shift) + c.phase_right)
                for i in range(*c.windows[window])
            ]
            assert claimed == products
    for pair in itertools.product(range(axis.kernel), repeat=2):
        met = any(
            all(0 <= coordinate(axis, p, k) < axis.size for k in pair) for p in range(axis.output)
        )
        assert (pair in found) == met
    keys = [c.key for c in axis.pair_classes]
    assert len(set(keys)) == len(keys)


@settings(max_examples=200)
@given(axes)
def test_canonical_classes_count_every_pair_once(axis):
    by_key = {c.key: c for c in axis.pair_classes}
    for c in axis.pair_classes:
        transposed = by_key[c.phase_right, c.phase_left, -c.shift]
        assert {(j, k) for k, j in c.window_of} == set(transposed.window_of)
        assert c.self_inverse == (transposed is c)
        assert c.canonical or transposed.canonical
        if not c.self_inverse:
            assert c.canonical != transposed.canonical


windows = st.tuples(st.integers(-5, 9), st.integers(1, 8)).map(lambda w: (w[0], w[0] + w[1]))


@settings(max_examples=300)
@given(st.lists(windows, min_size=1, max_size=6))
def test_cut(windows):
    """Segments are disjoint, rebuild every window, and no two neighbours could be one."""
    segments = cut(windows)
    assert segments == tuple(sorted(segments))
    covered_by = []
    for start, stop in segments:
        assert start < stop
        covering = {w for w in windows if w[0] <= start and stop <= w[1]}
        touching = {w for w in windows if w[0] < stop and start < w[1]}
        assert covering == touching  # whole segments only
        assert covering
        covered_by.append(covering)
    for window in windows:
        inside = [s for s, c in zip(segments, covered_by) if window in c]
        assert [i for s in inside for i in range(*s)] == list(range(*window))
    for (a, b), left, right in zip(itertools.pairwise(segments), covered_by, covered_by[1:]):
        assert a[1] < b[0] or left != right


@settings(max_examples=200)
@given(axes)
def test_segments_and_main(axis):
    for c in axis.pair_classes:
        assert c.segments == cut(c.windows)
        lengths = [stop - start for start, stop in c.segments]
        assert c.main in c.segments
        assert c.main[1] - c.main[0] == max(lengths)
        for i, window in enumerate(c.windows):
            for segment in c.segments:
                inside = set(range(*segment)) <= set(range(*window))
                assert c.covers(i, segment) == inside


@settings(max_examples=150)
@given(cases(min_batch=0))
def test_sizes_are_those_of_torch(case):
    g = case.geometry
    x = torch.empty(case.shape, device="meta")
    weight = torch.empty((case.groups, case.channels // case.groups, *case.kernel), device="meta")
    _, stride, padding, dilation, groups = case.arguments
    y = CONV[len(case.size)](x, weight, None, stride, padding, dilation, groups)
    assert g.output_size == y.shape[2:]
    assert g.positions == y[0:1, 0].numel() or case.batch == 0
    assert g.samples == y[:, 0].numel()
    assert g.dim == weight[0].numel()
    assert g.input_numel == x.numel()
    assert g.kernel_size == case.kernel
    assert g.with_batch(7).samples == 7 * g.positions


@settings(max_examples=200)
@given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)
def test_a_kernel_that_does_not_fit_fails_exactly_as_in_torch(
    size, kernel, stride, padding, dilation
):
    arguments = ([stride], [padding], [dilation], 1)
    try:
        torch.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, *arguments)
        message = None
    except RuntimeError as torch_error:
        message = str(torch_error)
    if message is None:
        make_geometry((1, 1, size), [kernel], *arguments)
    else:
        with pytest.raises(RuntimeError) as ours:
            make_geometry((1, 1, size), [kernel], *arguments)
        assert str(ours.value).startswith("Calculated padded input size per channel")
        assert "Kernel size can't be greater than actual input size" in str(ours.value)
        assert "Kernel size can't be greater than actual input size" in message


def test_rows():
    g = make_geometry((2, 3, 8), [], [], [], [], 2)
    assert (g.samples, g.dim, g.groups, g.taps, g.axes, g.pointwise) == (6, 4, 2, 1, (), True)
    assert make_geometry((8,), [], [], [], [], 1).samples == 1
    assert make_geometry((0, 8), [], [], [], [], 1).samples == 0


def test_pointwise():
    def pointwise(kernel, padding):
        return make_geometry((1, 2, 5, 5), kernel, [2, 1], padding, [1, 1], 1).pointwise

    assert pointwise([1, 1], [0, 0])
    assert not pointwise([1, 1], [0, 1])  # patches that read padding only
    assert not pointwise([1, 2], [0, 0])


def test_one_entry_stands_for_all_axes():
    full = make_geometry((1, 2, 9, 9), [3, 3], [2, 2], [1, 1], [2, 2], 1)
    assert make_geometry((1, 2, 9, 9), [3, 3], [2], [1], [2], 1) == full


def test_equal_geometries_are_one_key():
    a = make_geometry((2, 4, 9, 9), [3, 3], [1, 1], [1, 1], [1, 1], 2)
    b = make_geometry((2, 4, 9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 2)
    assert a == b
    assert hash(a) == hash(b)
    assert isinstance(a, ConvGeometry)


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"groups": 0}, "groups", "0"),
        ({"groups": -1}, "groups", "-1"),
        ({"groups": 3}, "groups", "3"),
        ({"shape": (4, 8, 8)}, "input", "(4, 8, 8)"),
        ({"shape": (1, 2, 4, 8, 8)}, "input", "(1, 2, 4, 8, 8)"),
        ({"shape": (), "kernel_size": []}, "input", "0-dimensional"),
        ({"kernel_size": [3, 3, 3, 3]}, "kernel_size", "[3, 3, 3, 3]"),
        ({"kernel_size": [0, 3]}, "kernel_size", "[0, 3]"),
        ({"stride": [1, 0]}, "stride", "[1, 0]"),
        ({"stride": [1, 1, 1]}, "stride", "[1, 1, 1]"),
        ({"stride": []}, "stride", "[]"),
        ({"padding": [-1, 0]}, "padding", "[-1, 0]"),
        ({"padding": [1, 1, 1]}, "padding", "[1, 1, 1]"),
        ({"dilation": [0, 1]}, "dilation", "[0, 1]"),
        ({"dilation": [1, 1, 1]}, "dilation", "[1, 1, 1]"),
    ],
)
def test_bad_arguments_are_named(change, name, value):
    good = {
        "shape": (1, 4, 8, 8),
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    make_geometry(**good)
    with pytest.raises(ValueError, match=name) as info:
        make_geometry(**(good | change))
    assert value in str(info.value)


@pytest.mark.parametrize("kernel", range(1, 7))
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_keeps_the_size(kernel, dilation):
    low, high = same_padding(kernel, dilation)
    assert 0 <= high - low <= 1
    assert low + high == dilation * (kernel - 1)
