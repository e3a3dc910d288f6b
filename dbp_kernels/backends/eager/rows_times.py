"""A = W R, few rows by a large square matrix, and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import plain
from . import onednn

# BLAS leaves threads idle where it multiplies up to so many rows by a matrix of at least this side.
# Parts of the inner dimension, of this size each, occupy them.
_THREADED_ROWS, _LARGE, _PART = 32, 2048, 256
# So many rows are worth the copies that oneDNN makes of R^T in parts.
_COPIED_ROWS = 256


def rows_times(X: Tensor, R: Tensor) -> Tensor:
    """X R for X (a, D), R (D, D), differentiable."""
    rows, dim = X.shape[0], R.shape[0]
    known = type(rows) is type(dim) is int  # to ask a symbol would make it a constant
    if not (R.is_cpu and known):
        return X @ R
    few = rows <= _THREADED_ROWS
    one_part = dim <= onednn.TERMS
    if (one_part or not few) and plain(X, R) and onednn.multiplies(X, R):
        return _ByOneDNN.apply(X, R)
    precise = R.dtype in (torch.float32, torch.float64)  # parts are rounded before they are added
    if not (few and dim >= _LARGE and dim % _PART == 0 and precise):
        return X @ R
    parts = (dim // _PART, _PART)
    return torch.bmm(X.unflatten(1, parts).transpose(0, 1), R.unflatten(0, parts)).sum(0)


class _ByOneDNN(torch.autograd.Function):
    """X R, where reverse-mode autograd is all that may follow. Its derivatives are such products."""

    @staticmethod
    def forward(ctx, X: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(X, R)
        return onednn.product(X, R)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        X, R = ctx.saved_tensors
        of_X, of_R = ctx.needs_input_grad
        return (
            _times_transposed(gradient, R) if of_X else None,
            X.mT @ gradient if of_R else None,
        )


def _times_transposed(X: Tensor, R: Tensor) -> Tensor:
    """X R^T for X (a, D), R (D, D), differentiable."""
    rows, dim = X.shape
    once_more = torch.is_grad_enabled() and (X.requires_grad or R.requires_grad)
    one_part = dim <= onednn.TERMS
    if once_more or not (one_part or rows >= _COPIED_ROWS) or not plain(X, R):
        return X @ R.mT
    # R with its dense rows goes first where there is little to transpose after it
    return onednn.product(R, X.mT).mT if rows <= _THREADED_ROWS else onednn.product(X, R.mT)
