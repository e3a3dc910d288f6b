"""The products that a convolution's second moment consists of, as integers: boxes of pixels.

A *box* is one class of tap pairs and one segment per axis (see ``axis.PairClass``): pixels that
contribute to exactly the same tap pairs. Its block is

    B[c, c'] = sum over images and pixels p of the box of  x(p)[c] * x(p + offset)[c']

Both pixels of every product exist, so no product needs a border mask. S is assembled by adding, for
each tap pair, the blocks of the boxes its window covers, transposed where only the transpose is
computed. Nothing is ever subtracted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from dbp_kernels.planning.axis import Axis, PairClass, Window
from dbp_kernels.planning.kept import kept

AXES = 3  # fewer spatial axes are preceded by axes of size 1

STRAIGHT, TRANSPOSED, SYMMETRIC = 0, 1, 2

Triple = tuple[int, int, int]


def canonical(classes: tuple[PairClass, ...]) -> bool:
    """Of a combination of classes and its transpose exactly one is canonical.

    Which of the two depends on the order of the axes: the first one to differ decides.
    """
    for c in classes:
        if not c.self_inverse:
            return c.canonical
    return True


def self_inverse(classes: tuple[PairClass, ...]) -> bool:
    """Whether a combination of classes equals its own transpose."""
    return all(c.self_inverse for c in classes)


def tap_pairs(
    classes: tuple[PairClass, ...], strides: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """Every pair of taps of a combination of classes: (left tap, right tap, place of its window).

    A tap's number is the sum of its axes' taps times ``strides``. The combinations of the classes'
    windows are numbered in row-major order.
    """
    found = [(0, 0, 0)]
    for c, stride in zip(classes, strides):
        count = c.window_count
        own = [(i * stride, j * stride, w) for i, j, w in zip(c.left, c.right, c.window_of)]
        found = [(k + i, m + j, p * count + w) for k, m, p in found for i, j, w in own]
    return found


def row_major(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """By what an axis' tap is multiplied in the number of a tap of all axes."""
    return tuple(math.prod(kernel[d + 1 :]) for d in range(len(kernel)))


@dataclass(frozen=True)
class Box:
    """Left pixels start + stride * (0 <= index < size) per axis; right pixels are ``offset`` away.

    ``symmetric``: the offset is zero, so the block equals its transpose.
    """

    start: Triple
    size: Triple
    offset: Triple
    symmetric: bool

    @property
    def positions(self) -> int:
        """Pixels per image."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Source:
    """What one tap pair's part of S is the sum of."""

    kind: int  # STRAIGHT, TRANSPOSED or SYMMETRIC, the same for all its boxes
    boxes: tuple[int, ...]


@dataclass(frozen=True, eq=False)  # one object per geometry: compared and hashed by identity
class Program:
    """All boxes of a geometry and the source of each ordered tap pair, row-major."""

    taps: int
    boxes: tuple[Box, ...]
    sources: tuple[Source, ...]


def _box(
    axes: tuple[Axis, ...], classes: tuple[PairClass, ...], segments: tuple[Window, ...]
) -> Box:
    absent = AXES - len(axes)
    start, size, offset = [0] * absent, [1] * absent, [0] * absent
    for axis, c, (low, high) in zip(axes, classes, segments):
        start.append(c.phase_left + axis.stride * low)
        size.append(high - low)
        offset.append(c.phase_right - c.phase_left + axis.stride * c.shift)
    return Box(_triple(start), _triple(size), _triple(offset), self_inverse(classes))


def _triple(words: list[int]) -> Triple:
    z, y, x = words
    return z, y, x


@kept(mebibytes=16)
def shift_program(axes: tuple[Axis, ...]) -> Program:
    """The program of a convolution's axes."""
    kernel = tuple(axis.kernel for axis in axes)
    taps, strides = math.prod(kernel), row_major(kernel)
    boxes: list[Box] = []
    nothing = Source(STRAIGHT, ())
    sources = [nothing] * taps**2
    for classes in itertools.product(*(a.pair_classes for a in axes)):
        if not canonical(classes):
            continue
        segments = [c.segments for c in classes]
        numbers = dict(zip(itertools.product(*segments), itertools.count(len(boxes))))
        boxes += [_box(axes, classes, each) for each in numbers]
        symmetric = self_inverse(classes)
        covered = (_covered(c.windows, own) for c, own in zip(classes, segments))
        by_place = [
            tuple(numbers[each] for each in itertools.product(*by_axis))
            for by_axis in itertools.product(*covered)
        ]
        straight = [Source(SYMMETRIC if symmetric else STRAIGHT, own) for own in by_place]
        transposed = [Source(TRANSPOSED, own) for own in by_place]
        for left, right, place in tap_pairs(classes, strides):
            sources[left * taps + right] = straight[place]
            if not symmetric:
                sources[right * taps + left] = transposed[place]
    return Program(taps, tuple(boxes), tuple(sources))


def _covered(windows: tuple[Window, ...], segments: tuple[Window, ...]) -> list[tuple[Window, ...]]:
    """The segments of each window."""
    first = {start: i for i, (start, _) in enumerate(segments)}
    last = {stop: i for i, (_, stop) in enumerate(segments)}
    return [segments[first[start] : last[stop] + 1] for start, stop in windows]


@lru_cache(maxsize=512)
def direct_program(rows: int) -> Program:
    """One symmetric box of ``rows`` pixels and a single tap: X^T X of a matrix with these rows."""
    box = Box((0, 0, 0), (1, 1, rows), (0, 0, 0), True)
    return Program(1, (box,), (Source(SYMMETRIC, (0,)),))
