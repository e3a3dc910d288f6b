"""In what precision things are computed: the dtype of statistics, autocast off, TF32 on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


# torch's precision of float32 products is read and set backend by backend here. The functions
# torch.get_float32_matmul_precision and allow_tf32 raise once a user has set it that way.

# What the names of torch.set_float32_matmul_precision mean: precision on CUDA, and on a CPU.
MATMUL_PRECISIONS = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}


def tf32() -> bool:
    """Whether products of float32 on CUDA may round their operands to TF32, torch's and ours."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def matmul_precision(name: str | None) -> AbstractContextManager:
    """Products of float32 within it have this one of MATMUL_PRECISIONS; None: as torch is set."""
    if name is None:
        return nullcontext()
    cuda, cpu = MATMUL_PRECISIONS[name]
    return _set({torch.backends.cuda.matmul: cuda, torch.backends.mkldnn.matmul: cpu})


def convolutions_as_matmul(x: Tensor) -> AbstractContextManager:
    """cuDNN convolutions within it have the precision of products."""
    if not x.is_cuda:
        return nullcontext()
    return _set({torch.backends.cudnn.conv: "tf32" if tf32() else "ieee"})


@contextmanager
def _set(precisions: dict[Any, str]) -> Iterator[None]:
    """Within it torch's operations, as ``torch.backends`` names them, have these precisions."""
    before = {operation: operation.fp32_precision for operation in precisions}
    try:
        for operation, precision in precisions.items():
            operation.fp32_precision = precision
        yield
    finally:
        for operation, precision in before.items():
            operation.fp32_precision = precision
