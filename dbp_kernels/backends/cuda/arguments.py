"""What kernels take: element types by number, sizes and strides by dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels.backends.prepared import ALIGNMENT
from dbp_kernels.precision import tf32

_NUMBERS = {torch.float16: 2, torch.bfloat16: 3}  # enum class DType in csrc/kernels/simt.cuh


def dtype_number(dtype: torch.dtype, product: bool = False) -> int:
    """The kernels' number of a dtype. ``product``: of a product's operands, where tf32 is one."""
    return _NUMBERS.get(dtype, int(product and tf32()))


def padded(channels: int, dtype: torch.dtype) -> int:
    """Channels of a row in memory: a multiple of 16 bytes."""
    unit = ALIGNMENT // dtype.itemsize
    return -(-channels // unit) * unit


def aligned_rows(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) is made of rows of channels at multiples of 16 bytes."""
    unit = ALIGNMENT // x.dtype.itemsize
    strides = [s for d, (s, n) in enumerate(zip(x.stride(), x.shape)) if d != 1 and n > 1]
    return (
        (x.stride(1) == 1 or x.shape[1] == 1)
        and x.shape[1] % unit == 0
        and x.data_ptr() % ALIGNMENT == 0
        and all(s % unit == 0 for s in strides)
    )


def four(x: Tensor) -> tuple[list[int], list[int]]:
    """(sizes, strides) of image and three spatial dimensions of (N, C, *spatial)."""
    absent = 5 - x.dim()
    sizes = [x.shape[0], *[1] * absent, *x.shape[2:]]
    return sizes, [x.stride(0), *[0] * absent, *x.stride()[2:]]
