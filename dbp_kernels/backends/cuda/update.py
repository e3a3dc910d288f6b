"""The update from the second moment: the library's products, one pass for the rule's epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.cuda import library
from dbp_kernels.precision import products_of_change
from dbp_kernels.products.matmul import symmetric_product

_CHUNK = 4096  # elements that leave one partial sum of each kind: update::kChunk


def weigh(M: Tensor, rule: rules.UpdateRule) -> tuple[Tensor, Tensor | None]:
    """Turns M = <x x^T> (G, D, D) into M' of `UpdateRule`, in place.

    Returns the loss (G,) and ||M'||_F^2 (G,), None unless the rule is guarded.
    """
    groups, dim, _ = M.shape
    partials = M.new_empty(2 * groups * -(-dim * dim // _CHUNK))
    sums = M.new_empty(2, groups)
    library.launch(
        "update",
        m=M,
        e=M,
        partials=partials,
        sums=sums,
        groups=groups,
        dim=dim,
        c_weight=rule.c_weight,
        v_weight=rule.v_weight,
        idle_weight=rule.idle_weight,
    )
    off, on = sums.unbind()
    return rule.loss(off, on), rule.square(off, on)


def gram_update(
    S: Tensor, R: Tensor, rule: rules.UpdateRule, overwrite: bool = False
) -> rules.Update:
    """As ``rules.gram_update``."""
    if R.dtype != torch.float32 or S.dtype != torch.float32:
        return rules.gram_update(S, R, rule, overwrite)
    P = torch.bmm(S, R.mT)
    M = symmetric_product(P, R.mT, out=S if overwrite and S.is_contiguous() else None)
    sums = weigh(M, rule)
    with products_of_change(R):
        return rules.Update(*sums, 1.0, torch.bmm(M, R, out=P))


def direct_update(Z: Tensor, R: Tensor, rule: rules.UpdateRule) -> rules.Update:
    """As ``rules.direct_update``."""
    if R.dtype != torch.float32 or Z.dtype != torch.float32:
        return rules.direct_update(Z, R, rule)
    X = torch.bmm(Z, R.mT)
    M = symmetric_product(X, X, alpha=1 / Z.shape[1])
    sums = weigh(M, rule)
    with products_of_change(R):
        return rules.Update(*sums, 1.0, torch.bmm(M, R))
