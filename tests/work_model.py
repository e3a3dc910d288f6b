"""A model in torch of the kernels that go through a work list, in float64: partial tiles, and S of them."""

from __future__ import annotations

import itertools

import torch

from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W


def pixel(box: boxes.Box, p: torch.Tensor, stride: boxes.Triple):
    """(image, z, y, x) of the left pixels numbered ``p``."""
    coordinates = []
    for start, size, step in reversed(list(zip(box.start, box.size, stride))):
        coordinates.append(start + step * (p % size))
        p = p // size
    return p, *reversed(coordinates)


def partials(x: torch.Tensor, work: W.Work, stride: boxes.Triple) -> torch.Tensor:
    """(slots, block, block): what the items write; NaN where none does."""
    block = work.block
    x = x.movedim(1, -1)
    padded = torch.nn.functional.pad(x, (0, -work.channels % block))
    out = torch.full((work.slots, block, block), torch.nan, dtype=x.dtype)
    for item in work.items:
        box = work.program.boxes[item.box]
        n, *left = pixel(box, torch.arange(item.first, item.last), stride)
        right = [c + d for c, d in zip(left, box.offset)]
        X = padded[n, left[0], left[1], left[2], item.i * block : (item.i + 1) * block]
        Y = padded[n, right[0], right[1], right[2], item.j * block : (item.j + 1) * block]
        assert out[item.slot].isnan().all(), "two items share a slot"
        out[item.slot] = X.T @ Y
    return out


def assembled(parts: torch.Tensor, work: W.Work, samples: int) -> torch.Tensor:
    """S (groups, D, D) from the partial tiles, element after element."""
    number = {pair: p for p, pair in enumerate(work.pairs)}
    upper = {pair: u for u, pair in enumerate(work.upper)}
    taps, block, cg = work.program.taps, work.block, work.group_channels
    groups = work.channels // cg
    S = torch.full((groups, cg, taps, cg, taps), torch.nan, dtype=parts.dtype)
    for g, c, d in itertools.product(range(groups), range(cg), range(cg)):
        row, column = g * cg + c, g * cg + d
        for k, j in itertools.product(range(taps), repeat=2):
            index = k * taps + j
            source, slots = work.program.sources[index], work.lists[index]
            r, s = row, column
            if source.kind == boxes.TRANSPOSED or (source.kind == boxes.SYMMETRIC and r > s):
                r, s = s, r
            pair = (r // block, s // block)
            if source.kind == boxes.SYMMETRIC:
                base = work.symmetric_base + upper[pair] * work.symmetric
            else:
                base = number[pair] * work.straight
            S[g, c, k, d, j] = sum(parts[base + slot, r % block, s % block] for slot in slots)
    return S.reshape(groups, cg * taps, cg * taps) / samples
