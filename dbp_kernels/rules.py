"""The update rule, by three exact plans that cost differently.

With n patches Z (n x D), second moment S = Z^T Z / n and x = R z:

    gram      M = R S R^T          then M' R                  5 D^3 (+ the cost of S)
    direct    X = Z R^T; M = X^T X / n; then M' R             3 n D^2 + 2 D^3
    samples   X = Z R^T; U = X R; [c/n X^T U + diag(d) R]     6 n D^2 (+ 2 n^2 D: the loss)

multiply-adds counted twice, and half of the symmetric M (large D come near it); M' is M with its
diagonal replaced (``UpdateRule``). All tensors are batched over a leading dimension G (groups of one
layer, or layers of equal shape). Plans are pure: no host synchronisation, nothing changed in place
but their own temporaries. They give an ``Update``, which knows everything but the step size.

Source: DBP paper (arXiv 2405.02385) eq. 3 and section 2.1; <x x^T> = R S R^T makes them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbp_kernels.interrupts import Once, version
from dbp_kernels.precision import products_of_change, rounding
from dbp_kernels.products.matmul import (
    add_product_,
    matmul,
    symmetric_product,
    times_transposed,
)

RULES = ("standard", "normalized")


@dataclass(frozen=True)
class UpdateRule:
    """The weights of one rule at one kappa and D: R <- R - lr M' R, M' = c_weight C + diag(v_weight v).

    The reported loss is (c_weight sum C^2 + kappa sum v^2) / loss_scale. ``guarded``: M' has 0 in
    place of -v_weight for entries of x without any variance, whose rows would grow for ever.
    """

    c_weight: float
    v_weight: float
    kappa: float
    loss_scale: float
    guarded: bool = False

    @classmethod
    def make(cls, rule: str, kappa: float, dim: int, guarded: bool = False) -> UpdateRule:
        """Raises ValueError for an unknown rule or a kappa outside [0, 1]."""
        if not 0.0 <= kappa <= 1.0:
            raise ValueError(f"kappa={kappa}: expected a number from 0 to 1")
        if rule == "standard":
            return cls(1 - kappa, kappa, kappa, float(dim * dim), guarded)
        if rule == "normalized":
            c_weight = (1 - kappa) / (dim - 1) if dim > 1 else 0.0
            return cls(c_weight, 2 * kappa, kappa, float(dim), guarded)
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, RULES))}")

    @property
    def idle_weight(self) -> float:
        """That of v where x has no variance."""
        return 0.0 if self.guarded else self.v_weight

    def stepped(self, v: Tensor, second: Tensor) -> Tensor:
        """v (G, D) as in M', for the second moments that it is of."""
        return v.masked_fill(second <= 0, 0) if self.guarded else v

    def loss(self, off: Tensor, on: Tensor) -> Tensor:
        """(G,), of sum C^2 and sum v^2 (G,)."""
        weights = self.c_weight / self.loss_scale, self.kappa / self.loss_scale
        return torch.add(weights[0] * off, on, alpha=weights[1])

    def square(self, off: Tensor, on: Tensor) -> Tensor | None:
        """(G,), ||M'||_F^2 (with all of v) of the same; None where nobody will ask."""
        if not self.guarded:
            return None
        return torch.add(self.c_weight**2 * off, on, alpha=self.v_weight**2)


@dataclass(frozen=True)
class Update:
    """M' R as a plan has worked it out; R has not changed yet.

    It is weight U, multiplied out (G, D, D), or with plan "samples" diag(d) R + weight X^T U.

    Attributes:
        loss: (G,).
        square: (G,), ||M'||_F^2; None unless the rule is guarded.
        weight: a number.
        U: (G, D, D), or (G, n, D) with plan "samples".
        few: of that plan X (G, n, D), the decorrelated samples, and d (G, D, 1), a number for each row
            of R; else None.
    """

    loss: Tensor
    square: Tensor | None
    weight: float
    U: Tensor
    few: tuple[Tensor, Tensor] | None = None

    def new(self, R: Tensor, rate: float) -> Tensor:
        """R - rate M' R, of the R (G, D, D) it was worked out from. U may be used up."""
        if rate == 0:  # an Inf in M' R would still make R NaN
            return R.clone(memory_format=torch.contiguous_format)
        if self.few is None:
            return torch.add(R, self.U, alpha=-rate * self.weight, out=self.U)
        X, d = self.few
        R_new = R * torch.rsub(d, 1, alpha=rate)
        _Product(R_new, X.mT, self.U, -rate * self.weight)()
        return R_new

    def changes(
        self,
        R: Tensor,
        rate: float,
        factor: Tensor | None = None,
        once: Callable[..., Callable[[], object]] = Once,
    ) -> list[Callable[[], object]]:
        """What makes R <- R - rate factor M' R in place when called one after the other, once.

        Any of them that raises may be called again. They take no memory for a dense R.

        Args:
            R: (G, D, D), that it was worked out from.
            factor: (G, 1, 1), for what is known to the device only.
            once: functools.partial if nothing will be called again: it takes no launches.
        """
        if self.few is None:
            scale = -rate * self.weight
            if factor is None:
                return [once(torch._foreach_add_, [R], [self.U], alpha=scale)]
            if R.is_cpu:  # so that a factor of 1 changes no bit: addcmul rounds once more here
                return [once(torch._foreach_add_, [R], [self.U.mul_(factor)], alpha=scale)]
            return [once(torch._foreach_addcmul_, [R], [self.U], [factor], value=scale)]
        X, d = self.few
        if factor is not None:
            d.mul_(factor)
            self.U.mul_(factor)
        rows = once(torch._foreach_mul_, [R], [torch.sub(_ONE, d, alpha=rate, out=d)])
        return [rows, _Product(R, X.mT, self.U, -rate * self.weight)]

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.U, *(self.few or ()))

    def parts(self, count: int) -> list[Tensor]:
        """What ``bounds`` takes the norms of, for ``count`` layers in a batch."""
        return [part for tensor in self._tensors for part in tensor.chunk(count)]

    def bounds(self, norms: Sequence[Tensor], count: int) -> Tensor:
        """(count,), of the norms of ``parts``: not finite where M' R is not; R is far from the largest.

        A NaN or Inf in R has shown in M' R: every entry of R meets one of M', and 0 Inf is NaN. So
        it has in X = R Z^T; no entry of X^T U exceeds ||X|| ||U||.
        """
        U, *few = torch.stack(list(norms)).view(-1, count).unbind()
        if not few:
            return self.weight * U
        X, d = few
        return torch.add(d, X * U, alpha=max(1.0, self.weight))

    def cancel_unless_(self, ok: Tensor) -> None:
        """Make this an update that leaves R as it is, but for groups that are ``ok`` (G, 1, 1)."""
        refused = ~ok
        for tensor in self._tensors:
            tensor.masked_fill_(refused, 0)


def no_update(R: Tensor) -> Update:
    """That of R (G, D, D) for no samples."""
    nothing = R.new_zeros(len(R))
    return Update(nothing, nothing, 1.0, torch.zeros_like(R))


# A number to kernels of any device, as it is 0-dimensional and on the CPU.
_ONE = torch.tensor(1.0, device="cpu")


class _Product:
    """R += scale X Y in place, once however often this is called.

    There is no call of torch that could write a mark as well. Whether one that raised had its effect is
    told by R's version, and where the error came from below what counts versions, by R's diagonal,
    to which X Y = c X X^T R adds: near R = I, squares.
    """

    def __init__(self, R: Tensor, X: Tensor, Y: Tensor, scale: float) -> None:
        self._R, self._operands = R, (X, Y, scale)
        self._diagonal = R.diagonal(dim1=-2, dim2=-1)
        self._before = torch.empty_like(self._diagonal)
        self._version: int | None = None  # of R before the first try

    def __call__(self) -> None:
        R = self._R
        if self._version is None:
            self._before.copy_(self._diagonal)
            self._version = version(R)
        elif self._version != version(R) or not torch.equal(self._before, self._diagonal):
            return
        with products_of_change(R):
            add_product_(R, *self._operands)


def _product_update(M: Tensor, R: Tensor, rule: UpdateRule) -> Update:
    """The update from M = <x x^T>, which is overwritten."""
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    v = diagonal - 1
    stepped = rule.stepped(v, diagonal)
    diagonal.zero_()
    off = torch.linalg.vector_norm(M, dim=(-2, -1)).square()  # one pass, no D x D temporary
    on = v.square().sum(-1)
    if rule.c_weight == 0:
        M.zero_()
    # c_weight goes into the factor: multiplying M by it would be a pass over M
    weight = rule.c_weight or 1.0
    diagonal.copy_(stepped * (rule.v_weight / weight))
    with products_of_change(R):
        MR = matmul(M, R)
    return Update(rule.loss(off, on), rule.square(off, on), weight, MR)


def gram_update(S: Tensor, R: Tensor, rule: UpdateRule, overwrite: bool = False) -> Update:
    """Plan "gram". S, R (G, D, D) of one dtype. With ``overwrite`` S serves as workspace."""
    P = matmul(R, S)  # rows of both P and R are dense, as the next product likes them
    M = symmetric_product(P.mT, R.mT, out=S if overwrite else None)
    del P
    return _product_update(M, R, rule)


def direct_update(Z: Tensor, R: Tensor, rule: UpdateRule) -> Update:
    """Plan "direct". Z (G, n, D) with n >= 1, R (G, D, D)."""
    X = matmul(R, Z.mT).mT  # its columns are dense, as the next product likes them
    return _product_update(symmetric_product(X, X, alpha=1 / Z.shape[1]), R, rule)


def low_rank_update(
    Z: Tensor,
    R: Tensor,
    rule: UpdateRule,
    product: Callable[[Tensor, Tensor], Tensor] = times_transposed,
) -> Update:
    """Plan "samples": C is never formed. Z (G, n, D) with n >= 1, R (G, D, D).

    Its sum of squares is ||X^T X||_F = ||X X^T||_F minus the diagonal's part. For n > D and nearly
    white x that difference loses its digits in float32, so the planner uses this plan for n <= D.
    ``product``, X (G, a, k), Y (G, b, k) -> X Y^T, is for the products that would form M.
    """
    n = Z.shape[1]
    X = product(Z, R)
    second = X.square().mean(1)  # (G, D), the diagonal of <x x^T>
    v = second - 1
    with products_of_change(R):
        inner = matmul(X, X.mT)  # of which nothing but sums of squares come
        U = matmul(X, R)
    total = torch.linalg.vector_norm(inner, dim=(-2, -1)).square() / n**2
    off = (total - second.square().sum(-1)).clamp_min(0)
    on = v.square().sum(-1)
    d = (rule.v_weight * rule.stepped(v, second)).sub_(second, alpha=rule.c_weight)
    # what may be lost of the difference must not make M' look smaller than it is
    most = torch.add(off, total, alpha=rounding(R)) if rule.guarded else off
    loss, square = rule.loss(off, on), rule.square(most, on)
    return Update(loss, square, rule.c_weight / n, U, (X, d.unsqueeze(-1)))


# The same at a step size, from the rule's name.


def update_from_gram(
    S: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard", overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Plan "gram". S, R (G, D, D) of one dtype -> R_new (G, D, D), loss (G,).

    With ``overwrite`` S serves as workspace: one D x D buffer fewer. Raises ValueError for an
    unknown rule or a kappa outside [0, 1].
    """
    update = gram_update(S, R, UpdateRule.make(rule, kappa, R.shape[-1]), overwrite)
    return update.new(R, lr), update.loss


def update_direct(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Plan "direct". Z (G, n, D) with n >= 1, R (G, D, D) -> R_new (G, D, D), loss (G,)."""
    update = direct_update(Z, R, UpdateRule.make(rule, kappa, R.shape[-1]))
    return update.new(R, lr), update.loss


def update_from_samples(
    Z: Tensor, R: Tensor, lr: float, kappa: float, rule: str = "standard"
) -> tuple[Tensor, Tensor]:
    """Plan "samples": C is never formed. Z (G, n, D) with n >= 1, R (G, D, D) as above."""
    update = low_rank_update(Z, R, UpdateRule.make(rule, kappa, R.shape[-1]))
    return update.new(R, lr), update.loss
