"""The opaque ops on checked arguments. Shapes as in ``schemas.txt``; R always (groups, D, D)."""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.eager.self_wgrad import patch_gram_self_wgrad
from dbp_kernels.backends.eager.shift import patch_gram_shift
from dbp_kernels.backends.eager.unfold import patch_gram_unfold, rows, windows
from dbp_kernels.phases import MOMENTS, PATCHES, PRODUCTS, span
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.precision import statistics_dtype
from dbp_kernels.products.matmul import matmul


def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice) -> Tensor:
    """S (groups, D, D), by the algorithm chosen. At least one sample."""
    with span(MOMENTS):
        if choice.name == "shift":
            return patch_gram_shift(x, geometry, choice.unfolded)
        if choice.name == "self_wgrad":
            return patch_gram_self_wgrad(x, geometry)
        return patch_gram_unfold(x, geometry)


def patch_mean(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """m (groups, D): the images are summed first, then each tap's window. At least one sample."""
    dtype = statistics_dtype(x.dtype)
    dims = len(geometry.axes)
    if dims == 0:
        return x.reshape(-1, geometry.groups, geometry.dim).mean(0, dtype=dtype)
    summed = windows(x.sum(0, keepdim=True, dtype=dtype), geometry, tuple(range(dims)))
    total = summed.sum(dim=tuple(range(2, 2 + dims)))  # (1, C, *taps)
    return total.reshape(geometry.groups, geometry.dim) / geometry.samples


def decor_stats(
    x: Tensor, R: Tensor, geometry: ConvGeometry, choice: Choice
) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D), by the way chosen. At least one sample."""
    if choice.name == "gram":
        M = matmul(matmul(R, patch_gram(x, geometry, choice.algorithm)), R.mT)
    else:
        X = matmul(rows(x, geometry, R.dtype), R.mT)
        M = matmul(X.mT, X).div_(geometry.samples)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    V = diagonal - 1
    diagonal.zero_()
    return M, V


gram_update = rules.gram_update
direct_update = rules.direct_update
low_rank_update = rules.low_rank_update


def patches(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype, demean: bool) -> Tensor:
    """Z (groups, n, D) of a dtype, without its mean if ``demean``."""
    with span(PATCHES):
        Z = rows(x, geometry, dtype)
        return Z - Z.mean(1, keepdim=True) if demean else Z


def decor_update(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    rule: rules.UpdateRule,
    demean: bool,
    choice: Choice,
) -> rules.Update:
    """What R (groups, D, D) is due, by the plan chosen."""
    if choice.name == "gram":
        S = patch_gram(x, geometry, choice.algorithm)
        if demean:
            m = patch_mean(x, geometry)
            S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
        with span(PRODUCTS):
            return rules.gram_update(S, R, rule, overwrite=True)
    Z = patches(x, geometry, R.dtype, demean)
    plan = rules.direct_update if choice.name == "direct" else rules.low_rank_update
    with span(PRODUCTS):
        return plan(Z, R, rule)


def fuses_stats(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether one kernel makes C and V of x: never."""
    return False


def unusable(device_type: str) -> str | None:
    """Always usable."""
    return None
