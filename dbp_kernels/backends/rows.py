"""Rows of channels: how kernels read images, and how samples lie that are taken for them.

The channels of a pixel follow each other. A row begins at a multiple of 16 bytes and has room up to the
next one, as vector loads, cp.async and TMA want it. The order of the pixels is free. What lies in the
room behind a row's channels may be anything: products of it are computed, and none is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


def vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return ALIGNMENT // dtype.itemsize


def padded(channels: int, dtype: torch.dtype) -> int:
    """Channels that a row has room for."""
    return -(-channels // vector(dtype)) * vector(dtype)


def aligned(x: Tensor) -> bool:
    """Whether x begins at a multiple of 16 bytes."""
    return x.data_ptr() % ALIGNMENT == 0


def has_room(x: Tensor) -> bool:
    """Whether x's memory goes on to the end of the 16 bytes that its last element is in."""
    unit = vector(x.dtype)
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    end = x.storage_offset() + (last // unit + 1) * unit
    return end * x.dtype.itemsize <= x.untyped_storage().nbytes()


def in_rows(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) lies in such rows."""
    unit = vector(x.dtype)
    strides = [s for d, (s, n) in enumerate(zip(x.stride(), x.shape)) if d != 1 and n > 1]
    return (
        (x.stride(1) == 1 or x.shape[1] == 1)
        and aligned(x)
        and all(s % unit == 0 for s in strides)
        and has_room(x)
    )


def widened(x: Tensor) -> Tensor:
    """x (N, C, *spatial), in rows, with their room as further channels: a view, or x itself."""
    row = padded(x.shape[1], x.dtype)
    if row == x.shape[1]:
        return x
    strides = x.stride(0), 1, *x.stride()[2:]
    return x.as_strided((x.shape[0], row, *x.shape[2:]), strides)


def to_rows(
    x: Tensor, pack: Callable[[Tensor], Tensor]
) -> tuple[tuple[Callable[[Tensor], Tensor], ...], Tensor]:
    """(steps that make rows of x or of what looks like it, the form of the result).

    Args:
        pack: copies to rows, laid out as ``empty``.
    """
    if not in_rows(x):
        return (pack,), empty(x)
    rows = widened(x)
    return (() if rows is x else (widened,)), rows


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for x (N, C, *spatial) in rows, in the order (N, *spatial), their room as channels."""
    dtype = dtype or x.dtype
    shape = (x.shape[0], *x.shape[2:], padded(x.shape[1], dtype))
    return torch.empty(shape, dtype=dtype, device=x.device).movedim(-1, 1)
