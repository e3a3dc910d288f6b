"""Matrix products with a long inner dimension: X^T Y and the symmetric X^T X, batched over groups."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# X^T X is computed in column panels, upper triangle only, once its side is worth cutting:
# p panels need (p + 1) / 2p of the full product's operations.
_PANEL = 256
_MAX_PANELS = 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(X: Tensor, Y: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (G, A, B) = X^T Y for X (G, n, A), Y (G, n, B); ``accumulate`` adds to ``out`` instead.

    Half-precision operands keep float32 results (only reached on CUDA; the CPU path upcasts).
    """
    if X.dtype != out.dtype:
        result = torch.bmm(X.mT, Y, out_dtype=out.dtype)
        out.add_(result) if accumulate else out.copy_(result)
    elif X.shape[0] == 1:
        # mm runs near the machine's peak on tall operands where bmm of one matrix may not.
        target = out[0]
        if accumulate:
            target.addmm_(X[0].T, Y[0])
        else:
            torch.mm(X[0].T, Y[0], out=target)
    elif accumulate:
        out.baddbmm_(X.mT, Y)
    else:
        torch.bmm(X.mT, Y, out=out)


def panels(dim: int) -> int:
    """Number of column panels ``symmetric_product`` cuts a matrix of side ``dim`` into."""
    return max(1, min(_MAX_PANELS, dim // _PANEL))


def symmetric_product(X: Tensor, out: Tensor, accumulate: bool) -> None:
    """The upper triangle (by panels) of out (G, D, D) = X^T X; finish with ``mirror``."""
    dim = X.shape[-1]
    count = panels(dim)
    if count == 1:
        return product(X, X, out, accumulate)
    edges = [dim * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        product(X[..., :stop], X[..., start:stop], out[:, :stop, start:stop], accumulate)
    return None


def mirror(out: Tensor) -> None:
    """Copies the panels above the diagonal of out (G, D, D) below it."""
    dim = out.shape[-1]
    count = panels(dim)
    edges = [dim * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        out[:, start:stop, :start] = out[:, :start, start:stop].mT
