"""Work of the staged-halo kernels (csrc/kernels/gram_shift*.cuh): main boxes of stride-1 convolutions.

Such a kernel reads a range of pixels once and multiplies it by all shifts. For each shift it computes
the largest box, its *main* one; the other boxes, border strips, are items of the box kernel, into the
same workspace. Pure integers; ``planning/boxes.py`` and ``work.py`` explain boxes and slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_kernels.planning.boxes import AXES, Box, Program, shift_program
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.kept import kept
from dbp_kernels.planning.work import MAX_PIXELS, Work, make_work

BLOCKS = (16, 32, 64)
SHARED_LIMIT = 99 << 10  # bytes a block of threads can have on every supported GPU
_WARPS, _STAGES = 8, 3  # GramShiftShape
_SM90_STAGES = 4  # GramShiftSm90Shape
# What an item costs beside its pixels, in pixels: starting, and its partial tiles.
_OVERHEAD = 256


@dataclass(frozen=True)
class Shape:
    """GramShiftShape: how a block of threads is cut."""

    block: int
    itemsize: int
    shifts = 7  # of one group of warps

    @property
    def columns(self) -> int:
        """Columns of a tile that one item computes."""
        return min(self.block, 32)

    @property
    def groups(self) -> int:
        """Groups of warps with different shifts."""
        return _WARPS // (self.columns // 8)

    @property
    def pixels(self) -> int:
        """Pixels staged at a time."""
        return 64 if self.itemsize == 2 else 32

    def shared_bytes(self, halo: int) -> int:
        """Shared memory of a block of threads."""
        padding = 16 if self.itemsize == 2 else 32
        left, right = (n * self.itemsize + padding for n in (self.block, self.columns))
        chunks = -(-halo // self.pixels) + _STAGES
        fixed = self.columns * self.itemsize + _STAGES * self.pixels * (4 + left)
        return fixed + chunks * self.pixels * right


class Sm90Shape:
    """GramShiftSm90Shape."""

    block, columns, groups, shifts, pixels = 64, 64, 2, 4, 64

    def shared_bytes(self, halo: int) -> int:
        """Shared memory of a block of threads."""
        tiles = -(-halo // self.pixels) + 2 * _SM90_STAGES
        row = 2 * self.block
        return tiles * self.pixels * row + row + _SM90_STAGES * (4 * self.pixels + 16)


@dataclass(frozen=True, eq=False)  # one object per problem: compared and hashed by identity
class ShiftPlan:
    """What both kernels and the reduction need.

    Attributes:
        work: slots of all boxes; its items are those of the box kernel.
        items, shifts, masks: rows of GramShiftParams' tables.
        halo: pixels the farthest shift reaches back.
    """

    work: Work
    items: tuple[tuple[int, ...], ...]
    shifts: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[int, ...], ...]
    halo: int


def _main_boxes(program: Program) -> dict[int, Box]:
    """The largest box of every shift, by its number."""
    largest: dict[tuple[int, ...], int] = {}
    for b, box in enumerate(program.boxes):
        other = largest.get(box.offset)
        if other is None or box.positions > program.boxes[other].positions:
            largest[box.offset] = b
    return {b: program.boxes[b] for b in sorted(largest.values())}


def _parts(items: int, pixels: int, halo: int, parallel: int, most: int) -> int:
    """Ranges that ``pixels`` are cut into, for all ``items`` to be done soonest."""

    def span(n: int) -> int:
        return -(-items * n // parallel) * (-(-pixels // n) + halo + _OVERHEAD)

    most = max(1, min(most, -(-pixels // 64), 4 * parallel))
    return min(range(1, most + 1), key=span)


def _spread(count: int, bins: int) -> list[int]:
    """``count`` over ``bins``, as evenly as possible."""
    return [count // bins + (b < count % bins) for b in range(bins)]


@kept(mebibytes=32)
def shift_plan(
    geometry: ConvGeometry,
    block: int,
    itemsize: int,
    block_k: int,
    parallel: int,
    max_workspace: int = 1 << 26,
    shared_limit: int = SHARED_LIMIT,
    sm90: bool = False,
) -> ShiftPlan | None:
    """The plan for tiles of ``block`` channels of ``itemsize`` bytes.

    None where the staged-halo kernel does not apply: strides, a halo larger than shared memory, no
    pixel that two taps see. The box kernel with ``shift_work`` does everything then.

    Args:
        block_k: pixels per step of the box kernel.
        parallel: blocks of threads of the box kernel that run at the same time; of the staged-halo
            kernel, which takes most registers of a multiprocessor, half as many do.
        max_workspace: bytes of float32 partials above which pixels are not split further.
        shared_limit: bytes of shared memory a block of threads can have.
        sm90: for csrc/kernels/gram_shift_sm90.cuh, which has tiles of 64 channels of 2 bytes only.
    """
    if sm90 and (block, itemsize) != (64, 2):
        return None
    shape = Sm90Shape() if sm90 else Shape(block, itemsize)
    sizes = (1,) * (AXES - len(geometry.axes)) + tuple(a.size for a in geometry.axes)
    image = math.prod(sizes)
    pixels = geometry.batch * image
    program = shift_program(geometry.axes)
    main = _main_boxes(program)
    flat = {
        b: (m.offset[0] * sizes[1] + m.offset[1]) * sizes[2] + m.offset[2] for b, m in main.items()
    }
    halo = max((-offset for offset in flat.values()), default=0)
    if (
        not main
        or any(a.stride != 1 for a in geometry.axes)
        or shape.shared_bytes(halo) > shared_limit
        or pixels > MAX_PIXELS
    ):
        return None

    # Shifts in sets, one item each, and in groups, one warp each.
    capacity = shape.groups * shape.shifts
    numbers = iter(main)
    sets = []
    for count in _spread(len(main), -(-len(main) // capacity)):
        groups = _spread(count, shape.groups)
        sets.append([[next(numbers) for _ in range(n)] for n in groups])

    # one part, to know the tile pairs
    whole = make_work(
        program, geometry.batch, geometry.channels, geometry.group_channels, block, block_k, 1, 0
    )
    across = block // shape.columns
    tiles = sum(len(whole.upper if m.symmetric else whole.pairs) for m in main.values())
    count = len(sets) * len(whole.pairs) * across
    slots = max(1, parallel // 2)
    parts = _parts(count, pixels, halo, slots, max_workspace // (4 * block**2 * tiles))
    each = -(-pixels // (parts * shape.pixels)) * shape.pixels
    parts = max(1, -(-pixels // each))
    work = make_work(
        program,
        geometry.batch,
        geometry.channels,
        geometry.group_channels,
        block,
        block_k,
        parallel,
        max_workspace,
        tuple((b, parts) for b in main),
    )

    upper = {pair: u for u, pair in enumerate(work.upper)}
    items = []
    for part in range(parts):  # those of the same pixels run together and find them in the cache
        first, last = part * each, min(pixels, (part + 1) * each)
        for p, (i, j) in enumerate(work.pairs):
            straight = p * work.straight + part
            symmetric = -1
            if (i, j) in upper:
                symmetric = work.symmetric_base + upper[i, j] * work.symmetric + part
            for column in range(across):
                for s in range(len(sets)):
                    items.append((i, j, column, s, first, last, straight, symmetric))
    shifts, masks = [], []
    for filled in sets:
        mask = [0] * sum(sizes)
        for g, group in enumerate(filled):
            for s, b in enumerate(group):
                box = main[b]
                shifts.append((flat[b], work.first_slot[b], int(box.symmetric), 1))
                begin = 0
                for axis, size in enumerate(sizes):
                    for c in range(box.start[axis], box.start[axis] + box.size[axis]):
                        mask[begin + c] |= 1 << (g * shape.shifts + s)
                    begin += size
            shifts += [(0, 0, 0, 0)] * (shape.shifts - len(group))
        masks.append(tuple(mask))
    return ShiftPlan(work, tuple(items), tuple(shifts), tuple(masks), halo)


@dataclass(frozen=True)
class ShiftTables:
    """A plan's tables on a device, int32."""

    items: Tensor
    shifts: Tensor
    masks: Tensor


@kept(mebibytes=32)
def make_shift_tables(plan: ShiftPlan, device: torch.device) -> ShiftTables:
    """The tables on a device. The first call for a plan copies them there, later ones do not."""

    def table(rows: tuple[tuple[int, ...], ...]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).to(device)

    with torch.inference_mode(False):
        return ShiftTables(table(plan.items), table(plan.shifts), table(plan.masks))
