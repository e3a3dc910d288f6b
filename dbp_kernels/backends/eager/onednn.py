"""Products of float32 by oneDNN, on CPUs that multiply faster with it than with torch's BLAS.

torch.mm goes to BLAS on every CPU; torch's operator of compiled linear layers goes to oneDNN, which
runs e.g. AMD processors faster than MKL does. It adds up one after the other where BLAS adds up
parts, so it rounds up to twice as much: for the update's products, not for statistics' long sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration import machine


def available() -> bool:
    """Whether this build of torch has the operator, which is not part of its public interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_AVAILABLE = available()


def faster(X: Tensor, Y: Tensor) -> bool:
    """Whether ``product`` is the way to multiply these: by the calibration of this CPU."""
    return (
        X.is_cpu
        and X.dtype == Y.dtype == torch.float32
        and _AVAILABLE
        and machine("cpu").onednn_pays
        and torch.backends.mkldnn.enabled
    )


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X Y for X (a, n), Y (n, b), float32 on a CPU; rows of X and rows or columns of Y best dense."""
    if 0 in X.shape or 0 in Y.shape:
        return torch.mm(X, Y)
    return torch.ops.mkldnn._linear_pointwise(X, Y.mT, None, "none", [], "")
