"""The opaque ops on checked arguments, as ``eager/ops.py``; what no kernel covers goes there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import gram, stats
from dbp_kernels.backends.cuda.update import update_direct, update_from_gram
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager.matmul import symmetric_product
from dbp_kernels.backends.eager.unfold import rows
from dbp_kernels.backends.prepared import prepared
from dbp_kernels.planning.choices import gram_choices, stats_choices, update_choices
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.planner import Choice

patch_mean = eager.patch_mean  # bound by one pass over the input, in any implementation
low_rank_update = eager.low_rank_update  # products only


def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice | None = None) -> Tensor:
    """S (groups, D, D), by the planner's choice unless one is given. At least one sample.

    Raises RuntimeError if that is "cuda_sm90" and its kernels do not cover this input or device.
    """
    return _gram(x, geometry, choice)(x)


@prepared
def _gram(x: Tensor, geometry: ConvGeometry, choice: Choice | None) -> Callable[[Tensor], Tensor]:
    """What computes S of an input that looks like x."""
    choice = choice or gram_choices(geometry, x.device.type, x.dtype, "cuda")[0]
    if not choice.name.startswith("cuda_"):
        return partial(eager.patch_gram, geometry=geometry, choice=choice)
    if not gram.supported(x, geometry):
        return partial(eager.patch_gram, geometry=geometry)
    if choice.name.endswith("_sm90"):
        problem = gram.sm90_problem(x, geometry)
        if problem:
            raise RuntimeError(
                f"the kernels for compute capability 9.0 were asked for, but {problem}"
            )
        if geometry.pointwise:
            return gram.matrix_gram_sm90(x, geometry)
        return gram.shift_gram(x, geometry, None, True)
    if geometry.pointwise:
        return gram.box_gram(x, geometry)
    if choice.name == "cuda_shift":
        return gram.shift_gram(x, geometry)
    return gram.direct_gram(x, geometry)


def decor_stats(
    x: Tensor, R: Tensor, geometry: ConvGeometry, choice: Choice | None = None
) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D). At least one sample."""
    if R.dtype != torch.float32:
        return eager.decor_stats(x, R, geometry)
    choice = choice or _stats_choice(x, geometry)
    if choice.name == "fused":
        return stats.decor_stats(x, R, geometry)
    if choice.name == "gram":
        M = symmetric_product(torch.bmm(patch_gram(x, geometry, choice.gram), R.mT), R.mT)
    else:
        X = torch.bmm(rows(x, geometry, R.dtype), R.mT)
        M = symmetric_product(X, X, alpha=1 / geometry.samples)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    V = diagonal - 1
    diagonal.zero_()
    return M, V


@prepared
def _stats_choice(x: Tensor, geometry: ConvGeometry) -> Choice:
    fused = stats.supported(x, geometry)
    offered = stats_choices(geometry, x.device.type, x.dtype, "cuda")
    return next(c for c in offered if fused or c.name != "fused")


@prepared
def _update_choice(x: Tensor, geometry: ConvGeometry) -> Choice:
    return update_choices(geometry, x.device.type, x.dtype, "cuda")[0]


def decor_update(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    lr: float,
    kappa: float,
    rule: str,
    demean: bool,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """R_new (groups, D, D) and loss (groups,), by the planner's choice of plan unless given."""
    choice = choice or _update_choice(x, geometry)
    if choice.name == "samples":
        return eager.decor_update(x, R, geometry, lr, kappa, rule, demean, choice)
    if choice.name == "direct":
        Z = rows(x, geometry, R.dtype)
        if demean:
            Z = Z - Z.mean(1, keepdim=True)
        return update_direct(Z, R, lr, kappa, rule)
    S = patch_gram(x, geometry, choice.gram)
    if demean:
        m = patch_mean(x, geometry)
        S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
    return update_from_gram(S, R, lr, kappa, rule, overwrite=True)
