"""The opaque ops on checked arguments. Shapes as in ``schemas.txt``; R always (groups, D, D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.eager.matmul import matmul
from dbp_kernels.backends.eager.self_wgrad import patch_gram_self_wgrad
from dbp_kernels.backends.eager.shift import patch_gram_shift
from dbp_kernels.backends.eager.unfold import patch_gram_unfold, rows, windows
from dbp_kernels.planning.choices import gram_choices, update_choices
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.planner import Choice
from dbp_kernels.precision import statistics_dtype


def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice | None = None) -> Tensor:
    """S (groups, D, D), by the planner's choice unless one is given. At least one sample."""
    if choice is None and geometry.pointwise:  # one algorithm: not worth a small layer's time
        return patch_gram_unfold(x, geometry)
    choice = choice or gram_choices(geometry, x.device.type, x.dtype, "eager")[0]
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


def _centred_gram(x: Tensor, geometry: ConvGeometry, demean: bool, choice: Choice | None) -> Tensor:
    S = patch_gram(x, geometry, choice)
    if demean:
        m = patch_mean(x, geometry)
        S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
    return S


def decor_stats(x: Tensor, R: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D). At least one sample."""
    choice = update_choices(geometry, x.device.type, x.dtype, "eager")[0]
    if choice.name == "gram":
        M = matmul(matmul(R, patch_gram(x, geometry, choice.gram)), R.mT)
    else:
        X = matmul(rows(x, geometry, R.dtype), R.mT)
        M = matmul(X.mT, X).div_(geometry.samples)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    V = diagonal - 1
    diagonal.zero_()
    return M, V


update_from_gram = rules.update_from_gram
update_direct = rules.update_direct
low_rank_update = rules.low_rank_update


def patches(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype, demean: bool) -> Tensor:
    """Z (groups, n, D) of a dtype, without its mean if ``demean``."""
    Z = rows(x, geometry, dtype)
    return Z - Z.mean(1, keepdim=True) if demean else Z


def work_out(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    lr: float,
    kappa: float,
    rule: str,
    demean: bool,
    choice: Choice | None = None,
) -> tuple[rules.Update, Tensor]:
    """The update that R is due, and loss (groups,), by the planner's choice of plan unless given."""
    choice = choice or update_choices(geometry, x.device.type, x.dtype, "eager")[0]
    if choice.name == "gram":
        S = _centred_gram(x, geometry, demean, choice.gram)
        return rules.gram_update(S, R, lr, kappa, rule, overwrite=True)
    Z = patches(x, geometry, R.dtype, demean)
    plan = rules.direct_update if choice.name == "direct" else rules.low_rank_update
    return plan(Z, R, lr, kappa, rule)


def decor_update(x: Tensor, R: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """R_new (groups, D, D) and loss (groups,). Arguments as ``work_out``."""
    update, loss = work_out(x, R, *arguments, **options)
    return update.new(R), loss


def unusable(device_type: str) -> str | None:
    """Always usable."""
    return None
