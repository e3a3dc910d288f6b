"""What the second moment's kernels compute, as integers: boxes of pixels, work items, sources of S.

A *box* is one class of tap pairs and one segment per axis (see ``geometry.PairClass``): pixels that
contribute to exactly the same tap pairs. Its block is

    B[c, c'] = sum over images and pixels p of the box of  x(p)[c] * x(p + offset)[c']

Both pixels of every product exist, so no product needs a border mask. S is assembled by adding, for
each tap pair, the blocks of the boxes its window covers, transposed where only the transpose is
computed. Nothing is ever subtracted.

A block is cut into tiles of channels and its pixels into parts: one *item* per program. An item
writes its partial tile to a *slot* of the workspace of its own; ``reduce.py`` sums the slots in a
fixed order. All tables are made once per geometry and kept on the device.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dbp_kernels.planning.geometry import Axis, ConvGeometry, PairClass

# In steps of block_k pixels: what an item costs beside its steps, and how short a part may be. The
# partial tile is written here and read again by the reduction.
_OVERHEAD, _SHORTEST = 8, 4

AXES = 3  # fewer spatial axes are preceded by axes of size 1
MAX_PIXELS = 2**31 - 2**16  # of one box, over all images: pixel numbers and their tiles are int32

STRAIGHT, TRANSPOSED, SYMMETRIC = 0, 1, 2

Triple = tuple[int, int, int]


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


def _canonical(classes: tuple[PairClass, ...]) -> bool:
    """Of a combination of classes and its transpose exactly one is canonical."""
    for c in classes:
        if not c.self_inverse:
            return c.canonical
    return True


def _box(axes: tuple[Axis, ...], classes: tuple[PairClass, ...], segments) -> Box:
    start, size, offset = [0] * AXES, [1] * AXES, [0] * AXES
    first = AXES - len(axes)
    for d, (axis, c, (low, high)) in enumerate(zip(axes, classes, segments), start=first):
        start[d] = c.phase_left + axis.stride * low
        size[d] = high - low
        offset[d] = c.phase_right - c.phase_left + axis.stride * c.shift
    symmetric = all(c.self_inverse for c in classes)
    return Box(tuple(start), tuple(size), tuple(offset), symmetric)


@lru_cache(maxsize=512)
def shift_program(axes: tuple[Axis, ...]) -> Program:
    """The program of a convolution's axes."""
    ids: dict[tuple, int] = {}
    boxes: list[Box] = []
    for classes in itertools.product(*(a.pair_classes for a in axes)):
        if not _canonical(classes):
            continue
        for segments in itertools.product(*(c.segments for c in classes)):
            ids[tuple(c.key for c in classes), segments] = len(boxes)
            boxes.append(_box(axes, classes, segments))

    class_of = [{pair: c for c in a.pair_classes for pair in c.window_of} for a in axes]

    def source(left: tuple[int, ...], right: tuple[int, ...]) -> Source:
        pairs = list(zip(left, right))
        if any(pair not in by_pair for pair, by_pair in zip(pairs, class_of)):
            return Source(STRAIGHT, ())  # no position sees both taps
        classes = tuple(by_pair[pair] for pair, by_pair in zip(pairs, class_of))
        if not _canonical(classes):
            return Source(TRANSPOSED, source(right, left).boxes)
        covered = (
            [s for s in c.segments if c.covers(c.window_of[pair], s)]
            for c, pair in zip(classes, pairs)
        )
        keys = tuple(c.key for c in classes)
        kind = SYMMETRIC if all(c.self_inverse for c in classes) else STRAIGHT
        return Source(kind, tuple(ids[keys, s] for s in itertools.product(*covered)))

    taps = list(itertools.product(*(range(a.kernel) for a in axes)))
    sources = tuple(source(k, j) for k in taps for j in taps)
    return Program(len(taps), tuple(boxes), sources)


@lru_cache(maxsize=512)
def direct_program(rows: int) -> Program:
    """One symmetric box of ``rows`` pixels and a single tap: X^T X of a matrix with these rows."""
    box = Box((0, 0, 0), (1, 1, rows), (0, 0, 0), True)
    return Program(1, (box,), (Source(SYMMETRIC, (0,)),))


# --------------------------------------------------------------------------- work list


@dataclass(frozen=True)
class Item:
    """One program: pixels [first, last) of a box, counted over (image, z, y, x), x fastest."""

    box: int
    i: int  # channel tile of the left operand
    j: int  # channel tile of the right operand
    first: int
    last: int
    slot: int


@dataclass(frozen=True, eq=False)  # as Program
class Work:
    """The items of a program and where their partial tiles go.

    A slot is a (block, block) tile of the workspace. Tile pair number p owns the slots
    [p*straight, (p+1)*straight) for boxes that are not symmetric; pair number u among those with
    i <= j owns ``symmetric`` slots, beginning at ``symmetric_base + u*symmetric``.

    Attributes:
        pairs: tile pairs (i, j) that some group of channels meets, row-major.
        splits: parts the pixels of each box are cut into.
        first_slot: of each box, the slot of its first part within those of a tile pair.
        lists: per tap pair, its slots within those of a tile pair, in the order they are summed.
    """

    program: Program
    channels: int
    group_channels: int
    block: int
    pairs: tuple[tuple[int, int], ...]
    splits: tuple[int, ...]
    first_slot: tuple[int, ...]
    items: tuple[Item, ...]
    straight: int
    symmetric: int
    lists: tuple[tuple[int, ...], ...]

    @cached_property
    def upper(self) -> tuple[tuple[int, int], ...]:
        """The pairs with i <= j."""
        return tuple(pair for pair in self.pairs if pair[0] <= pair[1])

    @property
    def symmetric_base(self) -> int:
        """First slot of the symmetric boxes."""
        return len(self.pairs) * self.straight

    @property
    def slots(self) -> int:
        """Tiles in the workspace."""
        return self.symmetric_base + len(self.upper) * self.symmetric

    @cached_property
    def entries(self) -> int:
        """Slots that all lists name together, those of equal lists once."""
        return sum(map(len, set(self.lists)))

    @property
    def workspace(self) -> int:
        """float32 elements of the workspace."""
        return self.slots * self.block**2


def tile_pairs(channels: int, group_channels: int, block: int) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j) of channel tiles such that some group has channels in both, row-major."""
    pairs = []
    for i in range(-(-channels // block)):
        last = min(channels, (i + 1) * block) - 1
        group_start = i * block // group_channels * group_channels
        group_stop = (last // group_channels + 1) * group_channels
        pairs += [(i, j) for j in range(group_start // block, (group_stop - 1) // block + 1)]
    return tuple(pairs)


Parts = tuple[tuple[int, int], ...]  # per box: number of parts, pixels of each but the last


def _cut(pixels: list[int], length: int, block_k: int) -> Parts:
    """Parts of nearly equal length, about ``length``, multiples of ``block_k``."""
    parts = []
    for p in pixels:
        n = max(1, round(p / length))
        each = -(-p // (n * block_k)) * block_k
        parts.append((-(-p // each), each))
    return tuple(parts)


def _makespan(pixels: list[int], tiles: list[int], parts: Parts, block_k: int, slots: int) -> int:
    """Steps until all items are done, when the longest waiting one goes to the next free slot."""
    steps = []
    for p, t, (n, each) in zip(pixels, tiles, parts):
        steps += [each // block_k + _OVERHEAD] * (t * (n - 1))
        steps += [-(-(p - (n - 1) * each) // block_k) + _OVERHEAD] * t
    busy = [0] * slots
    for length in sorted(steps, reverse=True):
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy)


def _split(
    pixels: list[int], tiles: list[int], block_k: int, parallel: int, max_tiles: int
) -> Parts:
    """How to cut the boxes so that all of them are done soonest.

    Args:
        pixels: of each box, over all images.
        tiles: channel tiles of each box.
        parallel: programs that run at the same time.
        max_tiles: partial tiles the workspace has room for.
    """
    total = sum(p * t for p, t in zip(pixels, tiles))
    best, least = None, 0
    for percent in (300, 200, 150, 120, 100, 90, 80, 70, 60, 50):
        length = max(_SHORTEST * block_k, total * 100 // (parallel * percent))
        parts = _cut(pixels, length, block_k)
        if sum(n * t for (n, _), t in zip(parts, tiles)) > max_tiles:
            continue
        span = _makespan(pixels, tiles, parts, block_k, parallel)
        if best is None or span <= least:  # of equal ones the one with fewer parts
            best, least = parts, span
        if sum(tiles) > 4 * parallel:
            break  # there is enough to do without splitting
    return best or _cut(pixels, max(pixels, default=1), block_k)


@lru_cache(maxsize=128)
def make_work(
    program: Program,
    batch: int,
    channels: int,
    group_channels: int,
    block: int,
    block_k: int,
    parallel: int,
    max_workspace: int = 1 << 26,
    elsewhere: tuple[tuple[int, int], ...] = (),
) -> Work:
    """The work list for tiles of ``block`` channels.

    Args:
        block_k: pixels per step; all items but the last of a box have a multiple of it.
        parallel: programs that run at the same time.
        max_workspace: bytes of float32 partials above which pixels are not split further.
        elsewhere: (box, parts): boxes without items, because another kernel computes them; they
            have slots, and are summed, like the others.
    """
    if any(batch * box.positions > MAX_PIXELS for box in program.boxes):
        raise ValueError(f"batch={batch}: expected at most {MAX_PIXELS} pixels in all images")
    pairs = tile_pairs(channels, group_channels, block)
    upper = [pair for pair in pairs if pair[0] <= pair[1]]
    pixels = [batch * box.positions for box in program.boxes]
    tiles = [len(upper if box.symmetric else pairs) for box in program.boxes]
    given = dict(elsewhere)
    here = [b for b in range(len(pixels)) if b not in given]
    max_tiles = max_workspace // (4 * block**2) - sum(n * tiles[b] for b, n in elsewhere)
    cut = _split([pixels[b] for b in here], [tiles[b] for b in here], block_k, parallel, max_tiles)
    by_box = dict(zip(here, cut)) | {b: (n, 0) for b, n in elsewhere}
    parts = [by_box[b] for b in range(len(pixels))]

    first_slot, counts = [], [0, 0]
    for box, (n, _) in zip(program.boxes, parts):
        first_slot.append(counts[box.symmetric])
        counts[box.symmetric] += n
    straight, symmetric = counts

    items = []
    for b, (box, (n, each)) in enumerate(zip(program.boxes, parts)):
        if b in given:
            continue
        base, owned = (len(pairs) * straight, symmetric) if box.symmetric else (0, straight)
        for p, (i, j) in enumerate(upper if box.symmetric else pairs):
            for part in range(n):
                first, last = part * each, min(pixels[b], (part + 1) * each)
                slot = base + p * owned + first_slot[b] + part
                items.append(Item(b, i, j, first, last, slot))
    # Long items first, so that short ones fill the end. Among items of about equal length those of
    # the same pixels run together and find them in the cache.
    unit = max(1, max((e for _, e in parts), default=1) // 8)
    items.sort(key=lambda t: (-((t.last - t.first) // unit), t.first, t.i, t.j, t.box))

    lists = tuple(
        tuple(first_slot[b] + part for b in s.boxes for part in range(parts[b][0]))
        for s in program.sources
    )
    return Work(
        program=program,
        channels=channels,
        group_channels=group_channels,
        block=block,
        pairs=pairs,
        splits=tuple(n for n, _ in parts),
        first_slot=tuple(first_slot),
        items=tuple(items),
        straight=straight,
        symmetric=symmetric,
        lists=lists,
    )


# --------------------------------------------------------------------------- tables


@dataclass(frozen=True, eq=False)
class Tables:
    """A work list as int32 tensors, one row per entry.

    Attributes:
        items: (items, 6): box, i, j, first, last, slot.
        boxes: (boxes, 15): start, size and offset as (z, y, x), then multiplier and shift (see
            ``reciprocal``) of the sizes x, y, z.
        tiles: (upper pairs, 4): i, j, number of the pair (i, j), number of the pair (j, i).
        taps: (tap pairs, 3): first entry and number of entries in ``slots``, kind.
        slots: entries of all tap pairs; equal lists are stored once.
        longest: entries of the longest list.
    """

    items: Tensor
    boxes: Tensor
    tiles: Tensor
    taps: Tensor
    slots: Tensor
    longest: int


def reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift): ``p // divisor == 2 * p * multiplier >> 32 >> shift`` for p < 2**31.

    Both factors have 32 bits, unsigned: the high word of a product, which GPUs have as one
    instruction; a division is a subroutine.
    """
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def signed(word: int) -> int:
    """A 32-bit unsigned word as the int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _box_row(box: Box) -> list[int]:
    words = [*box.start, *box.size, *box.offset]
    for size in reversed(box.size):  # x, y, z: the order in which a pixel number is taken apart
        multiplier, shift = reciprocal(size)
        words += [signed(multiplier), shift]
    return words


@lru_cache(maxsize=128)
def make_tables(work: Work, device: torch.device) -> Tables:
    """The tables on a device. Only the first call for a geometry copies them there.

    That copy cannot be captured in a CUDA graph: run once before capturing, as torch advises anyway.
    """
    number = {pair: p for p, pair in enumerate(work.pairs)}
    tiles = [[i, j, number[i, j], number[j, i]] for i, j in work.upper]
    start: dict[tuple[int, ...], int] = {}
    slots: list[int] = []
    taps = []
    for source, entries in zip(work.program.sources, work.lists):
        if entries not in start:
            start[entries] = len(slots)
            slots += entries
        taps.append([start[entries], len(entries), source.kind])
    items = [[t.box, t.i, t.j, t.first, t.last, t.slot] for t in work.items]

    def table(rows: list, width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(device)

    with torch.inference_mode(False):
        return Tables(
            items=table(items, 6),
            boxes=table([_box_row(box) for box in work.program.boxes], 15),
            tiles=table(tiles, 4),
            taps=table(taps, 3),
            slots=table(slots, 1),
            longest=max(map(len, work.lists)),
        )


def shift_work(
    geometry: ConvGeometry, block: int, block_k: int, parallel: int, max_workspace: int = 1 << 26
) -> Work:
    """The work list of a convolution's second moment."""
    program = shift_program(geometry.axes)
    return make_work(
        program,
        geometry.batch,
        geometry.channels,
        geometry.group_channels,
        block,
        block_k,
        parallel,
        max_workspace,
    )
