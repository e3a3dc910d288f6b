"""Matrix products, batched over groups: X^T Y with a long inner dimension, and those with R."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dbp_kernels.planning import layout
from dbp_kernels.products import onednn

# Libraries sum thin products over a long inner dimension one after the other, and lose digits.
_THIN, _LONG = 16, 1024


def matmul(X: Tensor, Y: Tensor) -> Tensor:
    """X Y for X (G, a, n), Y (G, n, b); one matrix by mm, which libraries run faster than bmm."""
    if X.shape[0] != 1:
        return torch.bmm(X, Y)
    multiply = onednn.product if onednn.faster(X, Y) else torch.mm
    return multiply(X[0], Y[0]).unsqueeze(0)


def times_transposed(X: Tensor, Y: Tensor) -> Tensor:
    """X Y^T for X (G, a, n), Y (G, b, n)."""
    return matmul(X, Y.mT)


def add_product_(R: Tensor, X: Tensor, Y: Tensor, alpha: float) -> None:
    """R += alpha X Y in place, for R (G, a, b), X (G, a, n), Y (G, n, b); alpha 0 ignores X Y."""
    if alpha == 0:
        return
    if X.shape[0] == 1:
        R[0].addmm_(X[0], Y[0], alpha=alpha)
    else:
        R.baddbmm_(X, Y, alpha=alpha)


def product(X: Tensor, Y: Tensor, out: Tensor, accumulate: bool, alpha: float = 1.0) -> None:
    """out (G, A, B) = alpha X^T Y for X (G, n, A), Y (G, n, B); ``accumulate`` adds to ``out``.

    Half-precision operands keep float32 results (only reached on CUDA; the CPU path upcasts).
    """
    thin = min(X.shape[-1], Y.shape[-1]) < _THIN and X.shape[1] >= 2 * _LONG
    half = X.dtype != out.dtype
    beta = 1 if accumulate else 0  # 0 ignores what is in ``out``, NaN included
    if half or (thin and X.device.type == "cpu"):
        result = torch.bmm(X.mT, Y, out_dtype=out.dtype) if half else _thin_product(X, Y)
        out.add_(result, alpha=alpha) if accumulate else torch.mul(result, alpha, out=out)
    elif X.shape[0] == 1:
        # addmm runs near the machine's peak on tall operands where bmm of one matrix may not
        out[0].addmm_(X[0].T, Y[0], beta=beta, alpha=alpha)
    else:
        out.baddbmm_(X.mT, Y, beta=beta, alpha=alpha)


def _thin_product(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y summed over pieces of the inner dimension."""
    g, n, a = X.shape
    pieces = n // _LONG
    whole = pieces * _LONG
    left = X[:, :whole].unflatten(1, (pieces, _LONG)).flatten(0, 1)
    right = Y[:, :whole].unflatten(1, (pieces, _LONG)).flatten(0, 1)
    total = torch.bmm(left.mT, right).view(g, pieces, a, -1).sum(1)
    return total.baddbmm_(X[:, whole:].mT, Y[:, whole:]) if whole < n else total


def upper_product(
    X: Tensor, Y: Tensor, out: Tensor, accumulate: bool, count: int, alpha: float = 1.0
) -> None:
    """The upper triangle, in ``count`` panels, of out (G, D, D) = alpha X^T Y, which is symmetric.

    Finish with ``mirror``.
    """
    if count == 1:
        return product(X, Y, out, accumulate, alpha)
    for start, stop in _edges(X.shape[-1], count):
        product(X[..., :stop], Y[..., start:stop], out[:, :stop, start:stop], accumulate, alpha)
    return None


def symmetric_product(
    X: Tensor, Y: Tensor, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """alpha X^T Y (G, D, D) for X, Y (G, n, D) whose product is symmetric; into ``out`` if given.

    On CPUs fastest where columns of X and Y are dense in memory.
    """
    count = layout.panels(X.shape[-1], X.shape[1], X.is_cuda)
    out = X.new_empty(X.shape[0], X.shape[-1], X.shape[-1]) if out is None else out
    if onednn.faster(X, Y):
        for start, stop in _edges(X.shape[-1], count):
            panel = onednn.product(X[0, :, :stop].mT, Y[0, :, start:stop])
            torch.mul(panel, alpha, out=out[0, :stop, start:stop])
    else:
        upper_product(X, Y, out, False, count, alpha)
    mirror(out, count)
    return out


def mirror(out: Tensor, count: int) -> None:
    """Copies the panels above the diagonal of out (G, D, D) below it.

    In tiles that a CPU's cache can hold; on CUDA, whose copies do that themselves, panel by panel.
    """
    for start, stop in _edges(out.shape[-1], count)[1:]:
        tile = start if out.is_cuda else layout.PANEL
        for left in range(0, start, tile):
            right = min(left + tile, start)
            out[:, start:stop, left:right] = out[:, left:right, start:stop].mT


def divide_upper(out: Tensor, count: int, n: int) -> None:
    """Divides by n the panels of out (G, D, D) that an ``upper_product`` writes."""
    for start, stop in _edges(out.shape[-1], count):
        out[:, :stop, start:stop].div_(n)


def _edges(dim: int, count: int) -> list[tuple[int, int]]:
    return list(pairwise(dim * i // count for i in range(count + 1)))
