"""What kernels take: element types by number, sizes and strides by dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels.precision import tf32

_NUMBERS = {torch.float16: 2, torch.bfloat16: 3}  # enum class DType in csrc/kernels/simt.cuh


def dtype_number(dtype: torch.dtype, product: bool = False) -> int:
    """The kernels' number of a dtype. ``product``: of a product's operands, where tf32 is one."""
    return _NUMBERS.get(dtype, int(product and tf32()))


def four(x: Tensor) -> tuple[list[int], list[int]]:
    """(sizes, strides) of image and three spatial dimensions of (N, C, *spatial)."""
    absent = 5 - x.dim()
    sizes = [x.shape[0], *[1] * absent, *x.shape[2:]]
    return sizes, [x.stride(0), *[0] * absent, *x.stride()[2:]]
