"""The definitions, by im2col, exactly as the paper states them. Start reading here.

Nothing in this file is optimised, and nothing fast may be imported into it: in float64 it is the
oracle that every other implementation is tested against. Sources: Dalm et al., "Efficient Deep
Learning with Decorrelated Backpropagation", arXiv 2405.02385, sections 2.1 (update rule) and 2.2
(convolutions).

``geometry`` arguments below are the op arguments ``kernel_size, stride, padding, dilation, groups``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dbp_kernels.planning.geometry import OpArguments


def patches(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """im2col. (N, C, *spatial) -> Z of shape (groups, n, D), rows ordered (image, position)."""
    if len(kernel_size) == 0:
        vectors = input.reshape(-1, input.shape[-1])
        return vectors.reshape(len(vectors), groups, vectors.shape[1] // groups).transpose(0, 1)
    dims = len(kernel_size)
    x = F.pad(input, [p for pad in reversed(padding) for p in (pad, pad)])
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]  # appends this axis' taps
    n, c = x.shape[:2]
    out = x.shape[2 : 2 + dims]
    x = x.reshape(n, groups, c // groups, *out, *kernel_size)
    position_axes = range(3, 3 + dims)
    tap_axes = range(3 + dims, 3 + 2 * dims)
    x = x.permute(1, 0, *position_axes, 2, *tap_axes)
    rows = n
    for size in out:
        rows *= size
    return (
        x.reshape(groups, rows, -1) if rows else x.reshape(groups, 0, _dim(c, groups, kernel_size))
    )


def _dim(channels: int, groups: int, kernel_size: Sequence[int]) -> int:
    dim = channels // groups
    for k in kernel_size:
        dim *= k
    return dim


def _mean_over_samples(total: Tensor, n: int) -> Tensor:
    return total / n if n else torch.zeros_like(total)


def patch_gram(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """S = <z z^T>, shape (groups, D, D). Zero for no samples."""
    Z = patches(input, *geometry)
    return _mean_over_samples(Z.mT @ Z, Z.shape[1])


def patch_mean(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """m = <z>, shape (groups, D). Zero for no samples."""
    Z = patches(input, *geometry)
    return _mean_over_samples(Z.sum(1), Z.shape[1])


def decor_stats(input: Tensor, R: Tensor, *geometry: Unpack[OpArguments]) -> tuple[Tensor, Tensor]:
    """C = <x x^T> with zero diagonal, and the diagonal of V = <x^2> - 1, for x = R z.

    Shapes (groups, D, D) and (groups, D). No samples: S = 0, hence C = 0 and V = -1.
    """
    Z = patches(input, *geometry)
    X = Z @ as_groups(R, Z.shape[0]).mT
    second = _mean_over_samples(X.mT @ X, X.shape[1])
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    return second - torch.diag_embed(diagonal), diagonal - 1


def decor_update(
    input: Tensor,
    R: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lr: float,
    kappa: float,
    rule: str = "standard",
    demean: bool = False,
) -> tuple[Tensor, Tensor]:
    """R - lr [(1-kappa) C + kappa V] R and the decorrelation loss (paper eq. 3; section 2.1).

    "normalized" weighs C by (1-kappa)/(D-1) and V by 2 kappa. ``demean`` replaces S by S - m m^T.
    Returns R_new (shape of R) and the 0-dimensional loss, the mean over groups.
    """
    Z = patches(input, kernel_size, stride, padding, dilation, groups)
    if Z.shape[1] == 0:
        return R.clone(), R.new_zeros(())
    if demean:
        Z = Z - Z.mean(1, keepdim=True)
    Rg = as_groups(R, groups)
    D = Rg.shape[-1]
    X = Z @ Rg.mT
    second = X.mT @ X / X.shape[1]
    v = second.diagonal(dim1=-2, dim2=-1) - 1
    C = second - torch.diag_embed(v + 1)
    if rule == "standard":
        c_weight, v_weight, loss_scale = 1 - kappa, kappa, D * D
    elif rule == "normalized":
        c_weight, v_weight, loss_scale = (1 - kappa) / (D - 1) if D > 1 else 0.0, 2 * kappa, D
    else:
        raise ValueError(f"rule={rule!r}: expected 'standard' or 'normalized'")
    R_new = Rg - lr * (c_weight * C + torch.diag_embed(v_weight * v)) @ Rg
    loss = (c_weight * C.square().sum((1, 2)) + kappa * v.square().sum(1)) / loss_scale
    return R_new.reshape(R.shape), loss.mean()


def decorrelate(
    input: Tensor,
    R: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x = R z at every position: (N, groups*D, *output), or (..., D) -> (..., groups*D)."""
    Z = patches(input, kernel_size, stride, padding, dilation, groups)
    X = (Z @ as_groups(R, groups).mT).transpose(0, 1)
    X = X.reshape(X.shape[0], X.shape[1] * X.shape[2])
    if len(kernel_size) == 0:
        return X.reshape(*input.shape[:-1], X.shape[1])
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input.shape[2:], kernel_size, stride, padding, dilation)
    ]
    return X.reshape(input.shape[0], *out, X.shape[1]).movedim(-1, 1).contiguous()


def as_groups(R: Tensor, groups: int) -> Tensor:
    """R as (groups, D, D)."""
    return R.reshape(groups, R.shape[-2], R.shape[-1])
