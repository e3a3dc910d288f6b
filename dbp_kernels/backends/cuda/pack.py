"""Any input as rows of channels, in one pass: csrc/kernels/pack.cuh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.cuda.arguments import dtype_number, four
from dbp_kernels.backends.prepared import prepared
from dbp_kernels.backends.rows import empty


def packing(x: Tensor, out: Tensor) -> Callable[..., None]:
    """Copies what looks like x (N, C, *spatial) to what looks like out, zeros to channels out has more.

    To be called with x, out and mean, which is None or (C) and subtracted.

    Args:
        out: (N, C', *spatial) in rows.
    """
    return _launch(x, out.dtype, out.shape[1], out.stride())


@prepared
def _launch(
    x: Tensor, dtype: torch.dtype, channels: int, strides: tuple[int, ...]
) -> Callable[..., None]:
    """To an output of this dtype, these channels and strides."""
    size, x_stride = four(x)
    return partial(
        library.launch,
        "pack",
        size=size,
        x_stride=x_stride,
        out_stride=[strides[0], *[0] * (5 - x.dim()), *strides[2:]],
        x_channel_stride=x.stride(1),
        channels=x.shape[1],
        row=channels,
        x_dtype=dtype_number(x.dtype),
        out_dtype=dtype_number(dtype),
    )


def pack(x: Tensor, dtype: torch.dtype | None = None, mean: Tensor | None = None) -> Tensor:
    """A copy of x (N, C, *spatial) minus ``mean`` in channels-last order, channels padded by zeros."""
    out = empty(x, dtype)
    packing(x, out)(x=x, out=out, mean=mean)
    return out
