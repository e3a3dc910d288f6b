"""Patches read where they are: element (pixel, column) of the im2col matrix, for any geometry.

A pixel is a position of the window, counted over (image, z, y, x); a column is (channel, tap) as in
S, over all groups. The address of an element is the sum of one offset for its pixel and one for its
column, so a kernel keeps two vectors for a tile of elements, and compares once per padded axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.tables import reciprocal
from dbp_kernels.backends.triton.gram_shift import divide
from dbp_kernels.planning.axis import Axis
from dbp_kernels.planning.boxes import AXES as MAX_AXES
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.work import MAX_PIXELS

MAX_INT = 2**31 - 1
STRIDES = ("stride_n", "stride_c", "stride_z", "stride_y", "stride_x")

# Where things are in the table of a geometry: 3 words each (z, y, x), 6 for the reciprocals.
_OUTPUT, _STEP, _KERNEL, _PADDING, _DILATION, _SIZE = (tl.constexpr(3 * n) for n in range(6))
_RECIPROCAL = tl.constexpr(18)


@triton.jit
def pixels(
    p, table, stride_n, stride_z, stride_y, stride_x, AXES: tl.constexpr, INDEX64: tl.constexpr
):
    """Offset and coordinates (z, y, x) of the first tap of the windows numbered p, less padding."""
    z, y, x, n = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p), p
    if AXES > 0:
        n = divide(p, table + _RECIPROCAL + 4)
        x = (p - n * tl.load(table + _OUTPUT + 2)) * tl.load(table + _STEP + 2)
    if AXES > 1:
        line = n
        n = divide(line, table + _RECIPROCAL + 2)
        y = (line - n * tl.load(table + _OUTPUT + 1)) * tl.load(table + _STEP + 1)
    if AXES > 2:
        plane = n
        n = divide(plane, table + _RECIPROCAL)
        z = (plane - n * tl.load(table + _OUTPUT)) * tl.load(table + _STEP)
    if INDEX64:
        offset = n.to(tl.int64) * stride_n + z.to(tl.int64) * stride_z
        offset += y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        offset = n * stride_n + z * stride_z + y * stride_y + x * stride_x
    return offset, z, y, x


@triton.jit
def columns(
    q, table, stride_c, stride_z, stride_y, stride_x, AXES: tl.constexpr, INDEX64: tl.constexpr
):
    """Offset and coordinates (z, y, x), padding subtracted, of the columns numbered q."""
    z, y, x, c = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q), q
    if AXES > 0:
        kernel = tl.load(table + _KERNEL + 2)
        c = q // kernel
        x = (q - c * kernel) * tl.load(table + _DILATION + 2) - tl.load(table + _PADDING + 2)
    if AXES > 1:
        line = c
        kernel = tl.load(table + _KERNEL + 1)
        c = line // kernel
        y = (line - c * kernel) * tl.load(table + _DILATION + 1) - tl.load(table + _PADDING + 1)
    if AXES > 2:
        plane = c
        kernel = tl.load(table + _KERNEL)
        c = plane // kernel
        z = (plane - c * kernel) * tl.load(table + _DILATION) - tl.load(table + _PADDING)
    if INDEX64:
        offset = c.to(tl.int64) * stride_c + z.to(tl.int64) * stride_z
        offset += y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        offset = c * stride_c + z * stride_z + y * stride_y + x * stride_x
    return offset, z, y, x


@triton.jit
def in_image(z, y, x, table, AXES: tl.constexpr):
    """Whether a coordinate is a pixel of the image rather than padding."""
    # unsigned, a negative coordinate is a large one
    inside = x.to(tl.uint32, bitcast=True) < tl.load(table + _SIZE + 2).to(tl.uint32, bitcast=True)
    if AXES > 1:
        size = tl.load(table + _SIZE + 1).to(tl.uint32, bitcast=True)
        inside = inside & (y.to(tl.uint32, bitcast=True) < size)
    if AXES > 2:
        size = tl.load(table + _SIZE).to(tl.uint32, bitcast=True)
        inside = inside & (z.to(tl.uint32, bitcast=True) < size)
    return inside


@triton.jit
def patches(
    x,
    pixel,  # what ``pixels`` gives for some numbers
    live,  # which of these pixels to read; the others are zero
    column,  # what ``columns`` gives
    table,
    AXES: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS_LAST: tl.constexpr,  # neighbouring threads read neighbouring pixels, not columns
):
    """A tile (columns, pixels) of the transposed im2col matrix."""
    row, z, y, x_ = pixel
    at, cz, cy, cx = column
    if PIXELS_LAST:
        inside = live[None, :]
        if PADDED:
            cz, cy, cx = (
                cz[:, None] + z[None, :],
                cy[:, None] + y[None, :],
                cx[:, None] + x_[None, :],
            )
            inside = inside & in_image(cz, cy, cx, table, AXES)
        tile = tl.load(x + (at[:, None] + row[None, :]), mask=inside, other=0.0)
    else:
        inside = live[:, None]
        if PADDED:
            cz, cy, cx = (
                cz[None, :] + z[:, None],
                cy[None, :] + y[:, None],
                cx[None, :] + x_[:, None],
            )
            inside = inside & in_image(cz, cy, cx, table, AXES)
        tile = tl.trans(tl.load(x + (at[None, :] + row[:, None]), mask=inside, other=0.0))
    return tile


@dataclass(frozen=True)
class Im2col:
    """An input as the kernels take it."""

    table: Tensor
    strides: tuple[int, ...]  # n, c, z, y, x
    axes: int
    padded: bool
    pixels_last: bool  # pixels of a line are closer to each other in memory than channels are
    wide: bool  # 32 bits do not hold every offset


def im2col(x: Tensor, geometry: ConvGeometry) -> Im2col:
    """Arguments for x (N, C, *spatial), or (rows, C) without axes. Any strides."""
    strides = [s if n > 1 else 0 for s, n in zip(x.stride(), x.shape)]
    missing = [0] * (MAX_AXES + 2 - x.dim())
    axes = geometry.axes
    # A tap on padding has an offset outside the image by as much as the window is wide.
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    reach += sum(2 * a.padding * s for a, s in zip(axes, strides[2:]))
    return Im2col(
        table=geometry_table(axes, x.device),
        strides=(*strides[:2], *missing, *strides[2:]),
        axes=len(axes),
        padded=any(a.padding for a in axes),
        pixels_last=len(axes) > 0 and (x.shape[1] == 1 or x.stride(-1) < x.stride(1)),
        wide=reach > MAX_INT,
    )


def readable(geometry: ConvGeometry) -> bool:
    """Whether the pixels can be numbered in 32 bits."""
    return geometry.samples <= MAX_PIXELS


@lru_cache(maxsize=512)
def geometry_table(axes: tuple[Axis, ...], device: torch.device) -> Tensor:
    """The integers of a geometry on a device, copied there by the first call only."""
    full = (Axis(1, 1, 1, 0, 1),) * (MAX_AXES - len(axes)) + axes
    words = [a.output for a in full] + [a.stride for a in full] + [a.kernel for a in full]
    words += [a.padding for a in full] + [a.dilation for a in full] + [a.size for a in full]
    for a in full:
        multiplier, shift = reciprocal(a.output)
        words += [multiplier - (1 << 32) if multiplier >> 31 else multiplier, shift]
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int32).to(device)
