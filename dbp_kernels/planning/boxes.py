"""The products that a convolution's second moment consists of, as integers: boxes of pixels.

A *box* is one class of tap pairs and one segment per axis (see ``geometry.PairClass``): pixels that
contribute to exactly the same tap pairs. Its block is

    B[c, c'] = sum over images and pixels p of the box of  x(p)[c] * x(p + offset)[c']

Both pixels of every product exist, so no product needs a border mask. S is assembled by adding, for
each tap pair, the blocks of the boxes its window covers, transposed where only the transpose is
computed. Nothing is ever subtracted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from dbp_kernels.planning.geometry import Axis, PairClass, Window

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


@dataclass(frozen=True)
class TapPair:
    """Where an ordered pair of taps finds its product: one class and window for each axis.

    ``transposed``: the classes are those of the pair the other way round.
    """

    classes: tuple[PairClass, ...]
    windows: tuple[int, ...]
    transposed: bool = False


def tap_pair(
    axes: tuple[Axis, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> TapPair | None:
    """That of two taps, in canonical classes; None where no position sees both."""
    pairs = tuple(zip(left, right))
    if any(pair not in axis.class_of for axis, pair in zip(axes, pairs)):
        return None
    classes = tuple(axis.class_of[pair] for axis, pair in zip(axes, pairs))
    if not canonical(classes):
        other = tap_pair(axes, right, left)
        return other and replace(other, transposed=True)
    return TapPair(classes, tuple(c.window_of[pair] for c, pair in zip(classes, pairs)))


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
    symmetric = all(c.self_inverse for c in classes)
    return Box(_triple(start), _triple(size), _triple(offset), symmetric)


def _triple(words: list[int]) -> Triple:
    z, y, x = words
    return z, y, x


@lru_cache(maxsize=512)
def shift_program(axes: tuple[Axis, ...]) -> Program:
    """The program of a convolution's axes."""
    ids: dict[tuple[object, ...], int] = {}
    boxes: list[Box] = []
    for classes in itertools.product(*(a.pair_classes for a in axes)):
        if not canonical(classes):
            continue
        for segments in itertools.product(*(c.segments for c in classes)):
            ids[tuple(c.key for c in classes), segments] = len(boxes)
            boxes.append(_box(axes, classes, segments))

    def source(left: tuple[int, ...], right: tuple[int, ...]) -> Source:
        found = tap_pair(axes, left, right)
        if found is None:
            return Source(STRAIGHT, ())
        covered = (
            [s for s in c.segments if c.covers(window, s)]
            for c, window in zip(found.classes, found.windows)
        )
        keys = tuple(c.key for c in found.classes)
        kind = TRANSPOSED if found.transposed else STRAIGHT
        if all(c.self_inverse for c in found.classes):
            kind = SYMMETRIC
        return Source(kind, tuple(ids[keys, s] for s in itertools.product(*covered)))

    taps = list(itertools.product(*(range(a.kernel) for a in axes)))
    sources = tuple(source(k, j) for k in taps for j in taps)
    return Program(len(taps), tuple(boxes), sources)


@lru_cache(maxsize=512)
def direct_program(rows: int) -> Program:
    """One symmetric box of ``rows`` pixels and a single tap: X^T X of a matrix with these rows."""
    box = Box((0, 0, 0), (1, 1, rows), (0, 0, 0), True)
    return Program(1, (box,), (Source(SYMMETRIC, (0,)),))
