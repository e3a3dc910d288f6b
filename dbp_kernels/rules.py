"""The update rule, by three exact plans that cost differently.

With n patches Z (n x D), second moment S = Z^T Z / n and x = R z:

    gram      M = R S R^T          then R - lr M' R                     5 D^3 (+ the cost of S)
    direct    X = Z R^T; M = X^T X / n; then R - lr M' R                3 n D^2 + 2 D^3
    samples   X = Z R^T; U = X R;  R - lr [c/n X^T U + diag(d) R]       6 n D^2 (+ 2 n^2 D: the loss)

multiply-adds counted twice, and half of the symmetric M (large D come near it); M' is M with its
diagonal replaced (``UpdateRule``). All tensors are batched over a leading dimension G (groups of one
layer, or layers of equal shape). Functions are pure: no host synchronisation, nothing changed in
place but their own temporaries. Every plan can also stop short of changing R: see ``ProductUpdate``
and ``LowRankUpdate``.

Source: DBP paper (arXiv 2405.02385) eq. 3 and section 2.1; <x x^T> = R S R^T makes them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_kernels.precision import products_of_change
from dbp_kernels.products.matmul import (
    add_product_,
    matmul,
    symmetric_product,
    times_transposed,
)

RULES = ("standard", "normalized")


@dataclass(frozen=True)
class UpdateRule:
    """The weights of one rule at one kappa and D: R <- R - lr [c_weight C + diag(v_weight v)] R.

    The reported loss is (c_weight sum C^2 + kappa sum v^2) / loss_scale.
    """

    c_weight: float
    v_weight: float
    kappa: float
    loss_scale: float

    @classmethod
    def make(cls, rule: str, kappa: float, dim: int) -> UpdateRule:
        """Raises ValueError for an unknown rule or a kappa outside [0, 1]."""
        if not 0.0 <= kappa <= 1.0:
            raise ValueError(f"kappa={kappa}: expected a number from 0 to 1")
        if rule == "standard":
            return cls(1 - kappa, kappa, kappa, float(dim * dim))
        if rule == "normalized":
            return cls((1 - kappa) / (dim - 1) if dim > 1 else 0.0, 2 * kappa, kappa, float(dim))
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, RULES))}")

    def loss(self, off: Tensor, v: Tensor) -> Tensor:
        """(G,), of sum C^2 (G,) and v (G, D); in as few calls as it takes."""
        weights = self.c_weight / self.loss_scale, self.kappa / self.loss_scale
        return torch.add(weights[0] * off, v.square().sum(-1), alpha=weights[1])


@dataclass(frozen=True)
class ProductUpdate:
    """R <- R + factor M' R, which plan "gram" or "direct" has worked out and not yet carried out.

    Attributes:
        MR: (G, D, D), the product M' R.
        factor: a number.
    """

    MR: Tensor
    factor: float

    def new(self, R: Tensor) -> Tensor:
        """R_new (G, D, D) of the R (G, D, D) it was worked out from, which stays as it is."""
        return torch.add(R, self.MR, alpha=self.factor)

    def apply_(self, R: Tensor) -> None:
        """Change R (G, D, D) in place, in one pass over it and MR."""
        R.add_(self.MR, alpha=self.factor)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What ``bound`` takes the norms of."""
        return (self.MR,)

    def bound(self, MR: Tensor) -> Tensor:
        """0-dimensional, of the norm of MR: not finite if R_new is not; R is far from the largest.

        A NaN or Inf in R has shown in MR: every entry of R meets one of M', and 0 Inf is NaN.
        """
        return abs(self.factor) * MR

    def cancel_unless_(self, ok: Tensor) -> None:
        """Make this, unless ``ok`` (0-dimensional bool), an update that leaves R as it is."""
        self.MR.masked_fill_(~ok, 0)


def _product_update(
    M: Tensor, R: Tensor, lr: float, rule: UpdateRule
) -> tuple[ProductUpdate, Tensor]:
    """The update from M = <x x^T>, which is overwritten, and the loss (G,)."""
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    v = diagonal - 1
    diagonal.zero_()
    off = torch.linalg.vector_norm(M, dim=(-2, -1)).square()  # one pass, no D x D temporary
    loss = rule.loss(off, v)
    if rule.c_weight == 0:
        M.zero_()
    # c_weight goes into the factor: multiplying M by it would be a pass over M
    weight = rule.c_weight or 1.0
    diagonal.copy_(v * (rule.v_weight / weight))
    # at lr = 0 an Inf in M' R would still make R NaN
    with products_of_change(R):
        MR = matmul(M, R) if lr else torch.zeros_like(R)
    return ProductUpdate(MR, -lr * weight), loss


def gram_update(
    S: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard", overwrite: bool = False
) -> tuple[ProductUpdate, Tensor]:
    """Plan "gram" up to its change of R. Arguments as `update_from_gram`; loss (G,)."""
    weights = UpdateRule.make(rule, kappa, R.shape[-1])
    P = matmul(R, S)  # rows of both P and R are dense, as the next product likes them
    M = symmetric_product(P.mT, R.mT, out=S if overwrite else None)
    del P
    return _product_update(M, R, lr, weights)


def update_from_gram(
    S: Tensor,
    R: Tensor,
    lr: float,
    kappa: float,
    rule: str = "standard",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plan "gram". S, R (G, D, D) of one dtype -> R_new (G, D, D), loss (G,).

    With ``overwrite`` S serves as workspace: one D x D buffer fewer. Raises ValueError for an
    unknown rule or a kappa outside [0, 1].
    """
    update, loss = gram_update(S, R, lr, kappa, rule, overwrite)
    return update.new(R), loss


def direct_update(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[ProductUpdate, Tensor]:
    """Plan "direct" up to its change of R. Arguments as `update_direct`; loss (G,)."""
    weights = UpdateRule.make(rule, kappa, R.shape[-1])
    X = matmul(R, Z.mT).mT  # its columns are dense, as the next product likes them
    return _product_update(symmetric_product(X, X, alpha=1 / Z.shape[1]), R, lr, weights)


def update_direct(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Plan "direct". Z (G, n, D) with n >= 1, R (G, D, D) -> R_new (G, D, D), loss (G,)."""
    update, loss = direct_update(Z, R, lr, kappa, rule)
    return update.new(R), loss


@dataclass(frozen=True)
class LowRankUpdate:
    """R <- scale R - weight X^T U, which plan "samples" has worked out and not yet carried out.

    Attributes:
        scale: (G, D, 1), one factor for each row of R.
        X, U: (G, n, D), the decorrelated samples and the same times R.
        weight: a number.
    """

    scale: Tensor
    X: Tensor
    U: Tensor
    weight: float

    def new(self, R: Tensor) -> Tensor:
        """R_new (G, D, D) of the R (G, D, D) it was worked out from, which stays as it is."""
        R_new = R * self.scale
        self._add_product_(R_new)
        return R_new

    def apply_(self, R: Tensor) -> None:
        """Change R (G, D, D) in place: two passes over it, and no other D x D memory for a dense R."""
        R.mul_(self.scale)
        self._add_product_(R)

    def _add_product_(self, R: Tensor) -> None:
        with products_of_change(R):
            add_product_(R, self.X.mT, self.U, -self.weight)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What ``bound`` takes the norms of."""
        return self.scale, self.X, self.U

    def bound(self, scale: Tensor, X: Tensor, U: Tensor) -> Tensor:
        """0-dimensional, of the norms of those: not finite if R_new is not; R is far from the largest.

        X = R Z^T has shown every NaN and Inf in R; no entry of X^T U exceeds ||X|| ||U||.
        """
        return scale + max(1.0, self.weight) * X * U

    def cancel_unless_(self, ok: Tensor) -> None:
        """Make this, unless ``ok`` (0-dimensional bool), an update that leaves R as it is."""
        refused = ~ok
        self.scale.masked_fill_(refused, 1)
        self.X.masked_fill_(refused, 0)
        self.U.masked_fill_(refused, 0)


# What plans have worked out: R itself has not changed yet.
Update = ProductUpdate | LowRankUpdate


def low_rank_update(
    Z: Tensor,
    R: Tensor,
    lr: float,
    kappa: float,
    rule: str = "standard",
    product: Callable[[Tensor, Tensor], Tensor] = times_transposed,
) -> tuple[LowRankUpdate, Tensor]:
    """Plan "samples" up to its change of R. Arguments as `update_from_samples`; loss (G,).

    The loss comes from ||X^T X||_F = ||X X^T||_F minus the diagonal's part. For n > D and nearly
    white x that difference loses its digits in float32, so the planner uses this plan for n <= D.
    ``product``, X (G, a, k), Y (G, b, k) -> X Y^T, is for the products that would form M.
    """
    weights = UpdateRule.make(rule, kappa, R.shape[-1])
    n = Z.shape[1]
    X = product(Z, R)
    second = X.square().mean(1)  # (G, D), the diagonal of <x x^T>
    v = second - 1
    with products_of_change(R):
        inner = matmul(X, X.mT)  # of which nothing but the loss comes
    total = torch.linalg.vector_norm(inner, dim=(-2, -1)).square() / n**2
    off = (total - second.square().sum(-1)).clamp_min(0)
    d = (weights.v_weight * v).sub_(second, alpha=weights.c_weight)
    scale = torch.rsub(d, 1, alpha=lr) if lr else torch.ones_like(d)
    with products_of_change(R):
        U = matmul(X, R)
    update = LowRankUpdate(scale.unsqueeze(-1), X, U, lr * weights.c_weight / n)
    return update, weights.loss(off, v)


def update_from_samples(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Plan "samples": C is never formed. Z (G, n, D) with n >= 1, R (G, D, D) as above."""
    update, loss = low_rank_update(Z, R, lr, kappa, rule)
    return update.new(R), loss
