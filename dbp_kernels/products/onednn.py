"""Products of float32 by oneDNN, on CPUs that multiply faster with it than with torch's BLAS.

torch.mm takes BLAS for float32 of full precision; torch's operator of compiled linear layers takes
oneDNN, which runs AMD processors faster than MKL does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels.planning.calibration import machine
from dbp_kernels.planning.layout import ONEDNN_WORTH

_ARGUMENTS = [
    "Tensor",
    "Tensor",
    "Optional[Tensor]",
    "str",
    "List[Optional[number]]",
    "Optional[str]",
]


def available() -> bool:
    """Whether this torch has the operator, as we know it: it is no part of the public interface."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    schema = torch.ops.mkldnn._linear_pointwise.default._schema
    return [str(argument.type) for argument in schema.arguments] == _ARGUMENTS


_AVAILABLE = available()

# oneDNN sums one after the other, where BLAS sums parts: over so many terms its error is 2 to 5 times
# that of BLAS, some 1e-6 of the largest result.
TERMS = 2048
_ROWS = 4  # matrices with fewer rows or columns are no work for it
# What is cut into parts of so many terms has gaps then, and is copied; many operations make up for it.
_COPIED_FOR = 192


def faster(X: Tensor, Y: Tensor, recorded: bool = True) -> bool:
    """Whether ``product`` is the way to multiply X (a, n) and Y (n, b), on this very CPU.

    Of batches (1, a, n) and (1, n, b) likewise. Where autograd is to follow it is not, unless the
    call is not ``recorded``. Forward-mode and functorch's derivatives are not looked for: what
    multiplies this way runs below them.
    """
    (a, n), b = X.shape[-2:], Y.shape[-1]
    Y_copied = Y.stride(-2) == 1
    return (
        X.is_cpu
        and X.shape[:-2].numel() == 1
        and a * n * b >= ONEDNN_WORTH
        and min(a, b) >= _ROWS
        and (n <= TERMS or (b >= _COPIED_FOR and (a >= _COPIED_FOR or not Y_copied)))
        and X.dtype == Y.dtype == torch.float32
        and _AVAILABLE
        and machine("cpu").onednn_pays
        and bool(torch.backends.mkldnn.enabled)
        and not (recorded and torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad))
    )


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X Y for X (a, n), Y (n, b), float32 on a CPU. Fastest where rows of X are dense in memory."""
    if 0 in X.shape or 0 in Y.shape:
        return torch.mm(X, Y)
    parts = -(-len(Y) // TERMS)
    total: Tensor | None = None
    for left, right in zip(X.tensor_split(parts, 1), Y.tensor_split(parts)):
        W = right.mT
        # oneDNN has kernels for matrices without gaps only, however few gaps there are
        if not (W.is_contiguous() or right.is_contiguous()):
            W = W.contiguous() if right.stride(0) == 1 else right.contiguous().mT
        part: Tensor = torch.ops.mkldnn._linear_pointwise(left, W, None, "none", [], "")
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
