"""The opaque ops on checked arguments, as ``eager/ops.py``; what no kernel covers goes there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.cuda import gram, stats
from dbp_kernels.backends.cuda.pack import packing as packing
from dbp_kernels.backends.cuda.update import direct_update, gram_update
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager.unfold import rows
from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.phases import MOMENTS, PRODUCTS, phase, span
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.products.matmul import symmetric_product
from dbp_kernels.rules import UpdateRule

patch_mean = eager.patch_mean  # bound by one pass over the input, in any implementation
low_rank_update = eager.low_rank_update  # products only


@phase(MOMENTS)
def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice) -> Tensor:
    """S (groups, D, D), by the algorithm chosen. At least one sample.

    Raises RuntimeError if it is "cuda_sm90" and its kernels do not cover this input or device.
    """
    return _gram(x, geometry, choice)(x)


@prepared
def _gram(x: Tensor, geometry: ConvGeometry, choice: Choice) -> Callable[[Tensor], Tensor]:
    """What computes S of an input that looks like x."""
    own = _OWN.get(choice.name)
    if own is None:
        return partial(eager.patch_gram, geometry=geometry, choice=choice)
    return own(x, geometry)


def _shift(x: Tensor, geometry: ConvGeometry) -> Gram:
    return gram.box_gram(x, geometry) if geometry.pointwise else gram.shift_gram(x, geometry)


def _direct(x: Tensor, geometry: ConvGeometry) -> Gram:
    return gram.box_gram(x, geometry) if geometry.pointwise else gram.direct_gram(x, geometry)


def _sm90(x: Tensor, geometry: ConvGeometry) -> Gram:
    problem = gram.sm90_problem(x, geometry)
    if problem:
        raise RuntimeError(f"the kernels for compute capability 9.0 were asked for, but {problem}")
    if geometry.pointwise:
        return gram.matrix_gram_sm90(x, geometry)
    return gram.shift_gram(x, geometry, None, True)


_OWN = {"cuda_shift": _shift, "cuda_direct": _direct, "cuda_sm90": _sm90}


def decor_stats(
    x: Tensor, R: Tensor, geometry: ConvGeometry, choice: Choice
) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D), by the way chosen. At least one sample."""
    if R.dtype != torch.float32:
        return eager.decor_stats(x, R, geometry, choice)
    if choice.name == "fused":
        return stats.decor_stats(x, R, geometry)
    if choice.name == "gram":
        M = symmetric_product(torch.bmm(patch_gram(x, geometry, choice.algorithm), R.mT), R.mT)
    else:
        X = torch.bmm(rows(x, geometry, R.dtype), R.mT)
        M = symmetric_product(X, X, alpha=1 / geometry.samples)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    V = diagonal - 1
    diagonal.zero_()
    return M, V


def fuses_stats(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether one kernel makes C and V of x."""
    return stats.supported(x, geometry)


def decor_update(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    rule: UpdateRule,
    demean: bool,
    choice: Choice,
) -> rules.Update:
    """As ``eager.decor_update``."""
    if choice.name == "gram":
        S = patch_gram(x, geometry, choice.algorithm)
        if demean:
            m = patch_mean(x, geometry)
            S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
        with span(PRODUCTS):
            return gram_update(S, R, rule, overwrite=True)
    plan = direct_update if choice.name == "direct" else low_rank_update
    Z = eager.patches(x, geometry, R.dtype, demean)
    with span(PRODUCTS):
        return plan(Z, R, rule)
