"""An axis against enumeration: phases, shifts, windows, segments, and how many there are."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.planning.axis import Axis, Counts, PairClass, cut

axes = st.builds(
    Axis,
    size=st.integers(1, 14),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 9),
    dilation=st.integers(1, 4),
).filter(lambda axis: axis.output >= 1)


def pairs(c: PairClass) -> list[tuple[int, int]]:
    return list(zip(c.left, c.right, strict=True))


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
def test_lattices_and_own_windows(axis):
    for phase in axis.phases:
        assert axis.lattice(phase) == len(range(phase, axis.size, axis.stride))
        windows = dict(axis.own_windows(phase))
        for k in range(axis.kernel):
            own, _ = axis.tap(k)
            seen = [coordinate(axis, p, k) for p in range(axis.output)]
            inside = [x // axis.stride for x in seen if 0 <= x < axis.size and own == phase]
            assert list(range(*windows.get(k, (0, 0)))) == inside


@settings(max_examples=300)
@given(axes)
def test_pair_classes(axis):
    """Every pair of taps that multiplies any pixels is in one class, with its exact window."""
    found = {}
    for c in axis.pair_classes:
        assert len(set(c.windows)) == len(c.windows)
        assert set(c.window_of) == set(range(len(c.windows)))
        for pair, window in zip(pairs(c), c.window_of, strict=True):
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
        assert {(j, k) for k, j in pairs(c)} == set(pairs(transposed))
        assert c.self_inverse == (transposed == c)
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


@settings(max_examples=500)
@given(axes)
def test_closed_forms_count_what_is_there(axis):
    classes = axis.pair_classes
    for c in classes:
        assert c.window_count == len(c.windows)
        assert c.segment_count == len(c.segments)
        assert c.pixels == sum(stop - start for start, stop in c.segments)
    own = [c for c in classes if c.self_inverse]
    assert axis.counts == Counts(
        classes=len(classes),
        segments=sum(len(c.segments) for c in classes),
        windows=sum(len(c.windows) for c in classes),
        pixels=sum(c.pixels for c in classes),
        self_classes=len(own),
        self_segments=sum(len(c.segments) for c in own),
        self_pixels=sum(c.pixels for c in own),
        reach=max((abs(c.shift) for c in classes), default=0),
    )


def test_what_is_too_long_to_be_counted_is_known_at_once():
    """Neither taps of one phase, nor phases of one tap."""
    for kernel, stride, dilation in ((2**62, 1, 1), (2**62, 2**61, 1), (10**5, 2**40, 3)):
        assert not Axis(2**62, kernel, stride, 2**40, dilation).countable
    for stride in (1, 100, 10**4):
        axis = Axis(10**5, 4096, stride, 0, 1)
        assert axis.countable
        assert axis.counts.classes > 0
