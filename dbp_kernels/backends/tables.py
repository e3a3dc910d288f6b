"""Work lists (``planning/work.py``) as tensors on a device, which all backends with kernels read.

They are made once per work list and device, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_kernels.planning.boxes import Box
from dbp_kernels.planning.kept import kept
from dbp_kernels.planning.work import Work


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


@kept(mebibytes=32)
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

    def table(rows: Sequence[object], width: int) -> Tensor:
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
