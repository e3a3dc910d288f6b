"""A = W R, few rows by a large square matrix, and its derivatives; in TF32 where A is rounded anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbp_kernels.plain_call import plain
from dbp_kernels.precision import tf32_products
from dbp_kernels.products import onednn

# BLAS leaves threads idle where it multiplies up to so many rows by a matrix of at least this side.
# Parts of the inner dimension, of this size each, occupy them.
_THREADED_ROWS, _LARGE, _PART = 32, 2048, 256


def rows_times(X: Tensor, R: Tensor, rounded: bool = False) -> Tensor:
    """X R for X (a, D), R (D, D), differentiable; ``rounded`` as for ``times``."""
    rows, dim = X.shape[0], R.shape[0]
    known = type(rows) is type(dim) is int  # to ask a symbol would make it a constant
    if rounded or not (R.is_cpu and known):
        return times(X, R, rounded)
    few = rows <= _THREADED_ROWS
    # few rows of more terms than that go faster in parts, both ways
    pays = dim <= onednn.TERMS or not few
    if pays and plain(X, R) and onednn.faster(X, R, recorded=False):
        product: Tensor = _ByOneDNN.apply(X, R)  # type: ignore[no-untyped-call]
        return product
    precise = R.dtype in (torch.float32, torch.float64)  # parts are rounded before they are added
    if not (few and dim >= _LARGE and dim % _PART == 0 and precise):
        return X @ R
    parts = (dim // _PART, _PART)
    return torch.bmm(X.unflatten(1, parts).transpose(0, 1), R.unflatten(0, parts)).sum(0)


def times(X: Tensor, Y: Tensor, rounded: bool) -> Tensor:
    """X Y for X (..., a, n), Y (..., n, b), differentiable. ``rounded``: TF32 on CUDA will do.

    Compiled, and under forward-mode and functorch's transforms, it has the precision torch is set
    to: its setting cannot be changed within what they trace.
    """
    if rounded and X.dtype == Y.dtype == torch.float32 and plain(X, Y):
        product: Tensor = _InTF32.apply(X, Y)  # type: ignore[no-untyped-call]
        return product
    return X @ Y


class _InTF32(torch.autograd.Function):
    """X Y, whose derivatives, not rounded to half precision everywhere, are as torch is set."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor) -> Tensor:
        of_X, of_Y = ctx.needs_input_grad
        ctx.save_for_backward(Y if of_X else None, X if of_Y else None)
        with tf32_products():
            return torch.matmul(X, Y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        Y, X = ctx.saved_tensors
        return (
            None if Y is None else gradient @ Y.mT,
            None if X is None else X.mT @ gradient,
        )


class _ByOneDNN(torch.autograd.Function):
    """X R, where reverse-mode autograd is all that may follow. It keeps what torch.mm keeps."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, R: Tensor) -> Tensor:
        of_X, of_R = ctx.needs_input_grad
        ctx.save_for_backward(R if of_X else None, X if of_R else None)
        return onednn.product(X, R)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        R, X = ctx.saved_tensors
        return (
            None if R is None else rows_times_transposed(gradient, R),
            None if X is None else X.mT @ gradient,
        )


def rows_times_transposed(X: Tensor, R: Tensor) -> Tensor:
    """X R^T for X (a, D), R (D, D), differentiable."""
    once_more = torch.is_grad_enabled() and (X.requires_grad or R.requires_grad)
    if not once_more and plain(X, R) and onednn.faster(X, R.mT, recorded=False):
        return onednn.product(X, R.mT)
    return X @ R.mT
