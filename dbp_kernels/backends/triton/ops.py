"""The opaque ops on checked arguments, as ``eager/ops.py``; what no kernel covers goes there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager.unfold import rows
from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.backends.triton import configs, gram_shift, gram_shift_tma, stats, update
from dbp_kernels.backends.triton.gram_direct import direct_gram
from dbp_kernels.backends.triton.pack import packing as packing
from dbp_kernels.backends.triton.product import product
from dbp_kernels.backends.triton.runtime import dot_precision, target
from dbp_kernels.phases import MOMENTS, PRODUCTS, phase, span
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.rules import UpdateRule

patch_mean = eager.patch_mean  # bound by one pass over the input, in any implementation


@phase(MOMENTS)
def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice) -> Tensor:
    """S (groups, D, D), by the algorithm chosen. At least one sample."""
    return _gram(x, geometry, choice)(x)


@prepared
def _gram(x: Tensor, geometry: ConvGeometry, choice: Choice) -> Callable[[Tensor], Tensor]:
    """What computes S of an input that looks like x."""
    own = _OWN.get(choice.name)
    if own is None:
        return partial(eager.patch_gram, geometry=geometry, choice=choice)
    return own(x, geometry)


def _shift(x: Tensor, geometry: ConvGeometry) -> Gram:
    """By pointers, or by tensor descriptors where that was measured to be faster."""
    if gram_shift_tma.usable(x, geometry):
        where = configs.precision_key(x.dtype), gram_shift.sizes(geometry), x.device
        pointers, tma = (configs.seconds(k.KERNEL, *where) for k in (gram_shift, gram_shift_tma))
        if tma and pointers and tma < pointers:
            return gram_shift_tma.tma_gram(x, geometry)
    return gram_shift.shift_gram(x, geometry)


_OWN = {"triton_shift": _shift, "triton_direct": direct_gram}


def decor_stats(
    x: Tensor, R: Tensor, geometry: ConvGeometry, choice: Choice
) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D), by the way chosen. At least one sample."""
    if R.dtype != torch.float32:
        return eager.decor_stats(x, R, geometry, choice)
    if choice.name == "fused":
        return stats.decor_stats(x, R, geometry)[:2]
    if choice.name == "gram":
        P, Q, scale = torch.bmm(R, patch_gram(x, geometry, choice.algorithm)), R, 1.0
    else:
        P = Q = torch.bmm(R, rows(x, geometry, R.dtype).mT)
        scale = 1 / geometry.samples
    # M = P Q^T, its diagonal less one
    M, *_ = update.symmetric_update(P, Q, scale, UpdateRule(1.0, 1.0, 0.0, 1.0))
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    V = diagonal.clone()
    diagonal.zero_()
    return M, V


def fuses_stats(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether one kernel makes C and V of x."""
    return stats.fits(geometry, target(x.device), dot_precision(torch.float32))


def decor_update(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    rule: UpdateRule,
    demean: bool,
    choice: Choice,
) -> rules.Update:
    """As ``eager.decor_update``."""
    if R.dtype != torch.float32:
        return eager.decor_update(x, R, geometry, rule, demean, choice)
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


def gram_update(S: Tensor, R: Tensor, rule: UpdateRule, overwrite: bool = False) -> rules.Update:
    """As ``rules.gram_update``; all matrices of the batch in the same launches."""
    own = R.dtype == torch.float32
    return (update.gram_update if own else rules.gram_update)(S, R, rule, overwrite)


def direct_update(Z: Tensor, R: Tensor, rule: UpdateRule) -> rules.Update:
    """As ``rules.direct_update``; all matrices of the batch in the same launches."""
    return (update.direct_update if R.dtype == torch.float32 else rules.direct_update)(Z, R, rule)


def low_rank_update(Z: Tensor, R: Tensor, rule: UpdateRule) -> rules.Update:
    """As ``rules.low_rank_update``."""
    own = (product,) if R.dtype == torch.float32 else ()
    return rules.low_rank_update(Z, R, rule, *own)
