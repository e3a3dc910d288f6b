"""A rival: one library GEMM for every shift between taps, on a padded channels-last buffer.

The input is copied once into rows of C channels, laid out (H, W + pad, N, C) with zero columns behind
every image row. For a shift (ey, ex) between two taps, the sum of x(q) x(q + e)^T over a range of
image rows is ONE product of two views of that buffer, (ey (W + pad) + ex) N rows apart: the zero
columns absorb what wraps around. What a tap's window leaves out in x, a few columns, is subtracted.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bench.core.registry import Case
from bench.rivals.dense import product


def why_not(case: Case) -> str:
    """Where it does not apply."""
    if case.is_linear or case.kernel == (1, 1):
        return "one pixel: unfold + matmul is the same"
    if case.stride != (1, 1):
        return "stride above 1"
    return "" if case.groups == 1 else "groups"


def _window(case: Case, axis: int, tap: int, other: int) -> tuple[int, int]:
    """Input positions q of ``tap`` for which tap ``other`` reads a pixel too."""
    size = (case.H, case.W)[axis]
    here, there = (case.dilation[axis] * k - case.padding[axis] for k in (tap, other))
    start = max(0, here, here - there)
    stop = min(size, here + case.output_size[axis], size + here - there)
    return start, max(start, stop)


def padded_gemm(x: Tensor, case: Case) -> Tensor:
    """S (1, D, D). Stride 1, one group; any padding, dilation and kernel."""
    (kh, kw), (dh, dw), channels = case.kernel, case.dilation, case.C
    span = dw * (kw - 1)
    # an image row of zeros before and behind: views reach beyond the ends
    buffer = x.new_zeros((case.H + 2, case.W + span, case.N, channels))
    image = buffer[1:-1]
    image[:, : case.W].copy_(x.permute(2, 3, 0, 1))
    rows, step = buffer.view(-1, channels), (case.W + span) * case.N

    def full(ey: int, ex: int, start: int, stop: int) -> Tensor:
        """Over image rows start...stop and all columns."""
        left = rows[(1 + start) * step : (1 + stop) * step]
        offset = (1 + start + ey) * step + ex * case.N
        return product(left.t(), rows[offset : offset + left.shape[0]])

    outside = [_outside(case, kx) for kx in range(kw)]
    columns = sorted(set().union(*outside))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    S = x.new_zeros((kh, kw, kh, kw, channels, channels), dtype=dtype)
    for down in range(kh):
        ranges = [_window(case, 0, ky, ky + down) for ky in range(kh - down)]
        cuts = sorted({edge for r in ranges for edge in r})
        for piece in pairwise(cuts):
            users = [ky for ky, r in enumerate(ranges) if _in(piece, r)]
            if not users:
                continue
            sums = [full(down * dh, m * dw, *piece) for m in range(0 if down == 0 else 1 - kw, kw)]
            if down == 0:  # shifts to the left are the transposes
                sums = [one.t() for one in sums[:0:-1]] + sums
            sums = torch.stack(sums)  # by shift in x, (2 KW - 1, C, C)
            lost = {c: _column(image, case, c, down * dh, piece) for c in columns}
            for kx in range(kw):
                shifts = slice(kw - 1 - kx, 2 * kw - 1 - kx)
                blocks = sums[shifts]
                for column in outside[kx]:
                    blocks = blocks - lost[column][shifts]
                for ky in users:
                    S[ky, kx, ky + down] += blocks
    for ky in range(kh):
        for jy in range(ky):
            S[ky, :, jy] = S[jy, :, ky].permute(1, 0, 3, 2)
    return S.permute(4, 0, 1, 5, 2, 3).reshape(1, case.D, case.D).div_(case.n)


def _in(piece: tuple[int, int], window: tuple[int, int]) -> bool:
    return window[0] <= piece[0] and piece[1] <= window[1]


def _outside(case: Case, kx: int) -> set[int]:
    """Columns that tap column kx never visits."""
    start, stop = _window(case, 1, kx, kx)
    return set(range(case.W)) - set(range(start, stop))


def _column(image: Tensor, case: Case, column: int, ey: int, piece: tuple[int, int]) -> Tensor:
    """What one column adds to the sums, (2 KW - 1, C, C): all shifts in x as one product."""
    start, stop = piece
    dw, kw = case.dilation[1], case.kernel[1]
    left = image[start:stop, column].reshape(-1, case.C)
    right = left.new_zeros((left.shape[0], 2 * kw - 1, case.C))
    for m in range(1 - kw, kw):
        if 0 <= column + m * dw < case.W:
            right[:, m + kw - 1] = image[start + ey : stop + ey, column + m * dw].flatten(0, 1)
    return product(left.t(), right.flatten(1)).unflatten(1, (-1, case.C)).transpose(0, 1)
