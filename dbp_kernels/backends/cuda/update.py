"""The update from the second moment: the library's products, one pass for the rule's epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.backends.cuda import library
from dbp_kernels.precision import products_of_change
from dbp_kernels.products.matmul import symmetric_product

_CHUNK = 4096  # elements that leave one partial sum of the loss: update::kChunk


def weigh(M: Tensor, rule: rules.UpdateRule) -> Tensor:
    """Turns M = <x x^T> (G, D, D) into c C + v V, in place. Returns the loss (G,)."""
    groups, dim, _ = M.shape
    partials = M.new_empty(groups * -(-dim * dim // _CHUNK))
    loss = M.new_empty(groups)
    library.launch(
        "update",
        m=M,
        e=M,
        partials=partials,
        loss=loss,
        groups=groups,
        dim=dim,
        c_weight=rule.c_weight,
        v_weight=rule.v_weight,
        c_loss=rule.c_weight / rule.loss_scale,
        v_loss=rule.kappa / rule.loss_scale,
    )
    return loss


def update_from_gram(
    S: Tensor,
    R: Tensor,
    lr: float,
    kappa: float,
    rule: str = "standard",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``plans.update_from_gram``."""
    if R.dtype != torch.float32 or S.dtype != torch.float32:
        return rules.update_from_gram(S, R, lr, kappa, rule, overwrite)
    weights = rules.UpdateRule.make(rule, kappa, R.shape[-1])
    P = torch.bmm(S, R.mT)
    M = symmetric_product(P, R.mT, out=S if overwrite and S.is_contiguous() else None)
    loss = weigh(M, weights)
    with products_of_change(R):
        return torch.baddbmm(R, M, R, alpha=-lr, out=P), loss


def update_direct(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[Tensor, Tensor]:
    """As ``plans.update_direct``."""
    if R.dtype != torch.float32 or Z.dtype != torch.float32:
        return rules.update_direct(Z, R, lr, kappa, rule)
    weights = rules.UpdateRule.make(rule, kappa, R.shape[-1])
    X = torch.bmm(Z, R.mT)
    M = symmetric_product(X, X, alpha=1 / Z.shape[1])
    loss = weigh(M, weights)
    with products_of_change(R):
        return torch.baddbmm(R, M, R, alpha=-lr), loss
