"""In what precision things are computed: the dtype of statistics, autocast off, TF32 on request."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of operands: CUDA multiplies half precision into float32, CPU libraries do not."""
    return x.dtype if x.is_cuda else statistics_dtype(x.dtype)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Statistics, updates and A = W R keep their precision under autocast."""
    device = x.device.type
    if device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def convolutions_as_matmul(x: Tensor) -> AbstractContextManager:
    """cuDNN convolutions within it obey ``torch.set_float32_matmul_precision``, as products do."""
    if not x.is_cuda:
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=torch.get_float32_matmul_precision() != "highest",
    )
