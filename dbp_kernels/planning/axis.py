"""One spatial axis of a convolution: taps, phases, shifts and windows. Pure integers, no tensors.

Tap ``k`` of output position ``p`` reads input coordinate ``stride*p + dilation*k - padding``.
Write ``t = dilation*k - padding``: the tap reads *phase* ``t mod stride`` of the input at lattice
index ``p + shift`` with ``shift = floor(t/stride)``. Two pairs of taps with the same phases and the
same difference of shifts therefore multiply the same pixels, except at the borders, where their
*windows* of lattice indices differ. That is all the structure the second moment needs.

The taps of a phase are evenly spaced, and so are their shifts: whatever is counted of their pairs has
a closed form, and a kernel of K taps is planned without looking at its K*K pairs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

Window = tuple[int, int]  # lattice indices [start, stop)

# Classes that are looked at to count them: an axis with more has products beyond all use.
_COUNTED = 1 << 13


@dataclass(frozen=True)
class PairClass:
    """Ordered pairs of taps of one axis that share a product: same phases, same shift difference.

    The pairs are (left[i], right[i]). The left operand's window moves by ``step`` from one to the
    next: that of pair i is [first + step*i, first + step*i + output), of which only [low, high) has
    pixels on both sides.
    """

    phase_left: int
    phase_right: int
    shift: int  # right lattice index = left lattice index + shift
    left: range
    right: range
    first: int
    step: int
    output: int
    low: int
    high: int

    @property
    def key(self) -> tuple[int, int, int]:
        """(left phase, right phase, shift)."""
        return self.phase_left, self.phase_right, self.shift

    @property
    def self_inverse(self) -> bool:
        """Whether the class equals its own transpose: the block of shift zero is symmetric."""
        return self.phase_left == self.phase_right and self.shift == 0

    @property
    def canonical(self) -> bool:
        """Of a class and its transpose exactly one is canonical (both when they coincide)."""
        return self.key <= (self.phase_right, self.phase_left, -self.shift)

    @property
    def _from_low(self) -> int:
        """Pairs, the first ones, whose windows start at ``low``."""
        return max(0, min(len(self.left), (self.low - self.first) // self.step + 1))

    @property
    def _before_high(self) -> int:
        """Pairs, the first ones, whose windows end before ``high``."""
        room = self.first + self.output - self.high
        return max(0, min(len(self.left), -(room // self.step)))

    @property
    def window_of(self) -> tuple[int, ...]:
        """The index of each pair's window: those of the pairs from low to high are all the same."""
        first, last = self._before_high, self._from_low - 1
        equal = max(0, last - first)
        return tuple(i - min(max(0, i - first), equal) for i in range(len(self.left)))

    @property
    def windows(self) -> tuple[Window, ...]:
        """The distinct windows, in ascending order of both ends."""
        starts = range(self.first, self.first + self.step * len(self.left), self.step)
        every = ((max(a, self.low), min(a + self.output, self.high)) for a in starts)
        return tuple(dict.fromkeys(every))

    @property
    def segments(self) -> tuple[Window, ...]:
        """The fewest intervals such that every window is a union of whole ones, in order."""
        return cut(self.windows)

    @property
    def window_count(self) -> int:
        """How many ``windows`` there are."""
        return len(self.left) - max(0, self._from_low - 1 - self._before_high)

    @property
    def segment_count(self) -> int:
        """How many ``segments`` there are."""
        pairs, low, high = len(self.left), self._from_low, self._before_high
        if self.output < self.step:  # no window touches the next one
            return pairs
        edges = (pairs - low) + (low > 0) + high + (high < pairs)
        if self.output % self.step == 0:  # where a window ends another one may start
            apart = self.output // self.step
            edges -= max(0, min(pairs, high + apart) - max(low, apart))
        return edges - 1

    @property
    def pixels(self) -> int:
        """Lattice indices in all windows together."""
        pairs = len(self.left)
        last = self.first + self.step * (pairs - 1)
        outside = max(0, self.low - self.first) + max(0, last + self.output - self.high)
        return self.output + (pairs - 1) * min(self.output, self.step) - outside


@dataclass(frozen=True)
class Counts:
    """What an axis has of each, over all its classes, and in those that are their own inverse.

    ``reach`` is the largest shift between two taps that see a pixel each.
    """

    classes: int
    segments: int
    windows: int
    pixels: int
    self_classes: int
    self_segments: int
    self_pixels: int
    reach: int


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution; sizes in pixels."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @cached_property
    def span(self) -> int:
        """Pixels from the first to the last tap, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @cached_property
    def output(self) -> int:
        """Number of output positions; 0 or less when the kernel does not fit."""
        return (self.size + 2 * self.padding - self.span) // self.stride + 1

    def tap(self, k: int) -> tuple[int, int]:
        """(phase, shift) of tap ``k``."""
        shift, phase = divmod(self.dilation * k - self.padding, self.stride)
        return phase, shift

    @cached_property
    def _first_taps(self) -> range:
        """The first tap of each phase; a phase's next tap is ``period`` further on."""
        return range(min(self.kernel, self.stride // math.gcd(self.stride, self.dilation)))

    def _taps(self, first: int) -> range:
        """The taps of a phase, of which the first is given."""
        return range(first, self.kernel, self.stride // math.gcd(self.stride, self.dilation))

    @property
    def phase_count(self) -> int:
        """How many ``phases`` there are."""
        return len(self._first_taps)

    @property
    def phases(self) -> tuple[int, ...]:
        """The phases some tap reads, in ascending order."""
        return tuple(sorted(self.tap(k)[0] for k in self._first_taps))

    def lattice(self, phase: int) -> int:
        """Number of input pixels in this phase."""
        return max(0, -((phase - self.size) // self.stride))

    def _classes(self, k: int, j: int) -> Iterator[PairClass]:
        """The non-empty classes of two phases, of which the first taps are given."""
        (left, first), (right, other) = self.tap(k), self.tap(j)
        lattice_left, lattice_right = self.lattice(left), self.lattice(right)
        taps_left, taps_right = self._taps(k), self._taps(j)
        step = self.dilation // math.gcd(self.stride, self.dilation)
        for ahead in range(1 - len(taps_left), len(taps_right)):  # right tap beside left one
            shift = other - first + step * ahead
            low, high = max(0, -shift), min(lattice_left, lattice_right - shift)
            # pairs of which the window contains any of [low, high)
            start = max(0, -ahead, (low - self.output - first) // step + 1)
            stop = min(len(taps_left), len(taps_right) - ahead, -((first - high) // step))
            if low < high and start < stop:
                yield PairClass(
                    phase_left=left,
                    phase_right=right,
                    shift=shift,
                    left=taps_left[start:stop],
                    right=taps_right[start + ahead : stop + ahead],
                    first=first + step * start,
                    step=step,
                    output=self.output,
                    low=low,
                    high=high,
                )

    @property
    def pair_classes(self) -> tuple[PairClass, ...]:
        """All non-empty classes of ordered tap pairs. Made anew: a long kernel has many."""
        phases = itertools.product(self._first_taps, repeat=2)
        classes = (c for k, j in phases for c in self._classes(k, j))
        return tuple(sorted(classes, key=lambda c: c.key))

    def own_windows(self, phase: int) -> tuple[tuple[int, Window], ...]:
        """(tap, non-empty lattice window) of each tap that reads ``phase``, in ascending order."""
        first = next(k for k in self._first_taps if self.tap(k)[0] == phase)
        for c in self._classes(first, first):
            if c.self_inverse:
                windows = c.windows
                return tuple((k, windows[w]) for k, w in zip(c.left, c.window_of))
        return ()

    @cached_property
    def _kinds(self) -> list[tuple[int, int]]:
        """(first tap, how many phases) of phases whose counts are equal, each kind once."""
        alike: Counter[tuple[int, int, int]] = Counter()
        first: dict[tuple[int, int, int], int] = {}
        for k in self._first_taps:
            phase, shift = self.tap(k)
            kind = shift, len(self._taps(k)), self.lattice(phase)
            alike[kind] += 1
            first.setdefault(kind, k)
        return [(first[kind], count) for kind, count in alike.items()]

    @cached_property
    def countable(self) -> bool:
        """Whether it takes little to count what there is to compute; else that is beyond all use."""
        if len(self._first_taps) > _COUNTED:
            return False
        return len(self._kinds) * sum(len(self._taps(k)) for k, _ in self._kinds) <= _COUNTED

    @cached_property
    def counts(self) -> Counts:
        """What there is to compute, by closed forms; of an axis that is ``countable``."""
        total: Counter[str] = Counter()
        for (k, left), (j, right) in itertools.product(self._kinds, repeat=2):
            for c in self._classes(k, j):
                total["reach"] = max(total["reach"], abs(c.shift))
                segments, pixels = c.segment_count, c.pixels
                total["classes"] += left * right
                total["segments"] += left * right * segments
                total["windows"] += left * right * c.window_count
                total["pixels"] += left * right * pixels
                if c.self_inverse:  # k is j: so is one phase in ``left`` of them
                    total["self_classes"] += left
                    total["self_segments"] += left * segments
                    total["self_pixels"] += left * pixels
        return Counts(**{f.name: total[f.name] for f in fields(Counts)})


def cut(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The fewest intervals such that every one of ``windows`` is a union of whole intervals."""
    change: Counter[int] = Counter()  # windows that start less those that end
    for start, stop in windows:
        change[start] += 1
        change[stop] -= 1
    segments = []
    covering = 0
    for a, b in itertools.pairwise(sorted(change)):
        covering += change[a]
        if covering:
            segments.append((a, b))
    return tuple(segments)
