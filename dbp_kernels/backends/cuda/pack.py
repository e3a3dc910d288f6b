"""Any input as rows of channels, in one pass: csrc/kernels/pack.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library
from .arguments import aligned_rows, dtype_number, four, padded


def pack(x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
    """A copy of x (N, C, *spatial) minus ``mean`` (C) in channels-last order.

    Channels are padded with zeros to a multiple of 16 bytes.
    """
    dtype = dtype or x.dtype
    row = padded(x.shape[1], dtype)
    out = torch.empty((x.shape[0], *x.shape[2:], row), dtype=dtype, device=x.device).movedim(-1, 1)
    size, x_stride = four(x)
    library.launch(
        "pack",
        x=x,
        out=out,
        mean=mean,
        size=size,
        x_stride=x_stride,
        out_stride=four(out)[1],
        x_channel_stride=x.stride(1),
        channels=x.shape[1],
        row=row,
        x_dtype=dtype_number(x.dtype),
        out_dtype=dtype_number(dtype),
    )
    return out


def rows_of_channels(x: Tensor) -> Tensor:
    """x itself if its channels lie together at multiples of 16 bytes, else a packed copy."""
    return x if aligned_rows(x) else pack(x)
