"""In what precision things are computed: dtypes of statistics, autocast, TF32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.precision_switch import FULL, Within, by_default

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of operands: CUDA multiplies half precision into float32, CPU libraries do not."""
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32


def _autocast(x: Tensor) -> bool:
    device = x.device.type
    return device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Statistics, updates and A = W R keep their precision under autocast."""
    return torch.autocast(x.device.type, enabled=False) if _autocast(x) else nullcontext()


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype a layer computes in with the input x: autocast's, which leaves float64 alone."""
    cast = _autocast(x) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


# torch's precision of float32 products is read and set backend by backend here. The functions
# torch.get_float32_matmul_precision and allow_tf32 raise once a user has set it that way.

_CUDA: Any = torch.backends.cuda.matmul
_CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # found at run time only
_CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]

# What the names of torch.set_float32_matmul_precision mean: precision on CUDA, and on a CPU.
MATMUL_PRECISIONS = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}


def tf32() -> bool:
    """Whether products of float32 on CUDA may round their operands to TF32, torch's and ours."""
    precision: str = _CUDA.fp32_precision
    return precision == "tf32"


def matmul_precision(name: str) -> AbstractContextManager[None]:
    """Products of float32 within it have this one of MATMUL_PRECISIONS."""
    return Within(_precisions(name))


def _precisions(name: str) -> dict[Any, str]:
    return dict(zip((_CUDA, _CPU), MATMUL_PRECISIONS[name]))


# Without a name the update's products are float32, but on CUDA the last one, M' R, is TF32 (plan
# "samples": the two it consists of). Those before it form M = R S R^T, whose large terms cancel:
# with them in TF32, R does not converge where S is badly conditioned. M' R costs next to nothing in
# TF32: its error shrinks with the change of R. From bench/results/precision (python -m bench
# precision). Kernels of ours form M by three products of TF32, which lose no more than float32.
def update_precision(name: str | None, cuda: bool) -> AbstractContextManager[None]:
    """An update's products, some on CUDA or none, have this one of MATMUL_PRECISIONS, or None's."""
    if name is not None:
        return Within(_precisions(name), by_default=False)
    return Within({_CPU: FULL, _CUDA: FULL} if cuda else {_CPU: FULL}, by_default=True)


def products_in(precision: str) -> AbstractContextManager[None]:
    """Within it ``update_products`` is "ieee", "tf32x3" or "tf32"; half precision takes "ieee"."""
    return update_precision({"tf32": "high", "tf32x3": None}.get(precision, "highest"), True)


def products_of_change(R: Tensor) -> AbstractContextManager[None]:
    """Within it an update forms M' R: in TF32 where that is the default and R is on CUDA."""
    if by_default() and on_cuda(R):
        return tf32_products()
    return nullcontext()


def rounding(R: Tensor) -> float:
    """More than the relative error of ||X X^T||_F^2 by a product of an update's change of R."""
    if R.dtype == torch.float64:
        return 2.0**-48
    if on_cuda(R):
        return 2.0**-9 if by_default() or tf32() else 2.0**-18
    return 2.0**-6 if _CPU.fp32_precision == "bf16" else 2.0**-18


def update_products() -> str:
    """What an update's products of float32 on CUDA are now.

    "ieee": float32. "tf32": TF32. "tf32x3", which is the default of DecorUpdate: those that form
    M = R S R^T are as exact as float32, by three TF32 products in kernels that can and in float32
    elsewhere; those of M' R are TF32.
    """
    if tf32():
        return "tf32"
    return "tf32x3" if by_default() else "ieee"


def tf32_products() -> AbstractContextManager[None]:
    """Products of float32 on CUDA within it are in TF32."""
    return Within({_CUDA: "tf32"})


def computed_in_half(weight: Tensor) -> bool:
    """Whether a layer on CUDA rounds its weight to half precision before it uses it."""
    return on_cuda(weight) and computed_dtype(weight) in (torch.float16, torch.bfloat16)


def on_cuda(x: Tensor) -> bool:
    """Whether x is on CUDA. Tests have tensors on a CPU pass for such."""
    return x.is_cuda


def convolutions_as_matmul(x: Tensor) -> AbstractContextManager[None]:
    """cuDNN convolutions within it have the precision of products."""
    if not x.is_cuda:
        return nullcontext()
    return Within({_CONVOLUTIONS: "tf32" if tf32() else "ieee"})
