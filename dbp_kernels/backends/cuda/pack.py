"""Any input as rows of channels, in one pass: csrc/kernels/pack.cuh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.cuda.arguments import dtype_number, four, padded
from dbp_kernels.backends.prepared import prepared


def empty_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What ``pack`` writes: like x (N, C, *spatial), channels-last and padded to 16 bytes."""
    dtype = dtype or x.dtype
    shape = (x.shape[0], *x.shape[2:], padded(x.shape[1], dtype))
    return torch.empty(shape, dtype=dtype, device=x.device).movedim(-1, 1)


@prepared
def _launch(x: Tensor, dtype: torch.dtype | None) -> Callable[..., None]:
    out = empty_rows(x, dtype)
    size, x_stride = four(x)
    return partial(
        library.launch,
        "pack",
        size=size,
        x_stride=x_stride,
        out_stride=four(out)[1],
        x_channel_stride=x.stride(1),
        channels=x.shape[1],
        row=out.shape[1],
        x_dtype=dtype_number(x.dtype),
        out_dtype=dtype_number(out.dtype),
    )


def pack(x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
    """A copy of x (N, C, *spatial) minus ``mean`` (C) in channels-last order.

    Channels are padded with zeros to a multiple of 16 bytes.
    """
    out = empty_rows(x, dtype)
    _launch(x, dtype)(x=x, out=out, mean=mean)
    return out
