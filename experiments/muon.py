"""Muon (Jordan et al. 2024) for weights of any number of dimensions; torch's own takes matrices only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalised(G: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of G = U s V^T, (m, n), in ``dtype``, by Newton and Schulz's iteration.

    The quintic of Jordan et al., chosen for speed: singular values come between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = G.shape[0] > G.shape[1]
    X = (G.mT if tall else G).to(dtype)
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        S = X @ X.mT
        X = torch.addmm(X, torch.addmm(S, S, S, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: as torch.optim.Muon, with a convolution's weight as (out, the rest).

    Args:
        params: weights of at least 2 dimensions.
        lr: times sqrt(max(1, rows / columns)) ("original"), or 0.2 sqrt(max(rows, columns))
            ("match_rms_adamw", Liu et al. 2025), as ``adjust`` says.
        weight_decay: decoupled.
        momentum, nesterov: of the average of gradients.
        dtype: of the iteration; None: bfloat16 on a GPU, float32 elsewhere.

    Raises ValueError for other parameters or values.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust: str = "original",
        dtype: torch.dtype | None = None,
    ) -> None:
        if adjust not in _ADJUST:
            raise ValueError(f"adjust is {adjust!r}: expected one of {list(_ADJUST)}")
        self.dtype = dtype
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust": adjust,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() < 2:
                    raise ValueError(f"params has one of shape {tuple(p.shape)}: expected matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum, average = group["momentum"], state["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        matrix = update.flatten(1)
        dtype = self.dtype or (torch.bfloat16 if p.is_cuda else torch.float32)
        direction = orthogonalised(matrix, dtype).reshape(p.shape)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction.to(p.dtype), alpha=-group["lr"] * _ADJUST[group["adjust"]](*matrix.shape))


_ADJUST: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
