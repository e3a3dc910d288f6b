"""The work list of a kernel that computes a second moment, as integers.

The block of each box (see ``boxes.py``) is cut into tiles of channels and its pixels into parts: one
*item* per program. An item writes its partial tile to a *slot* of the workspace of its own; ``reduce``
sums the slots in a fixed order.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

from dbp_kernels.planning.boxes import Program, shift_program
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.kept import kept

# In steps of block_k pixels: what an item costs beside its steps, and how short a part may be. The
# partial tile is written here and read again by the reduction.
_OVERHEAD, _SHORTEST = 8, 4

MAX_PIXELS = 2**31 - 2**16  # of one box, over all images: pixel numbers and their tiles are int32


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


@kept(mebibytes=32)
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
