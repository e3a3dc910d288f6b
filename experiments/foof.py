"""A second-order rival on our own S: each weight's gradient times (S + damping I)^-1.

That is FOOF (Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order
Optimization", 2022), or K-FAC with its input factor alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import dbp_kernels as dbp
from dbp_kernels.optim.kinds import Patches, patches_of
from dbp_kernels.sampling import sample_size
from experiments import parallel


class Foof:
    """Preconditions gradients when the optimiser steps; made after ``dbp.attach``, if that is used.

    S is an average of ``dbp.patch_gram`` of the first images of every ``every``-th batch: a running
    one, but a plain mean until that has seen enough, or the first batch would count for too long. Under DBP the layer's input is x = R z, and R S R^T takes the place of S.

    Args:
        model: its layers of the kinds that ``dbp.register`` knows are preconditioned.
        optimizer: of its weights.
        damping: added to S's diagonal, in its unit (the square of an input's).
        decay: of the running average: it sees 1 / (1 - decay) batches.
        every: steps from one S, and one inverse, to the next.
        sample: images for S, as for ``dbp.attach``.
        decor: what ``dbp.attach`` has returned.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        damping: float = 1e-2,
        decay: float = 0.95,
        every: int = 10,
        sample: float | int = 1.0,
        decor: dbp.Attached | None = None,
    ) -> None:
        for name, ok, expected in (
            ("damping", damping > 0, "above 0"),
            ("decay", 0 <= decay < 1, "from 0 to below 1"),
            ("every", every >= 1, "at least 1"),
            ("sample", sample > 0, "above 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {locals()[name]!r}: expected {expected}")
        self.damping, self.decay, self.every, self.sample = damping, decay, every, sample
        self.steps = 0
        self.due = True  # told apart from the steps, for which each would be compiled anew
        self.fresh: dict[str, Tensor] = {}  # this step's
        self.S: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self.decor = decor
        self.decorrelated = set() if decor is None else set(decor.decorrelated())
        self.layers: dict[str, tuple[nn.Module, Patches]] = {}
        for name, module in model.named_modules():
            name = name or type(module).__name__  # as dbp.attach calls it
            patches = patches_of(module)
            if isinstance(patches, Patches):
                self.layers[name] = module, patches
                module.register_forward_hook(self._seen(name, patches), with_kwargs=True)
        optimizer.register_step_pre_hook(self._precondition)

    def _seen(self, name: str, patches: Patches) -> Any:
        def hook(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
            if not (self.due and module.training and torch.is_grad_enabled()):
                return
            x = patches.input(arguments, named)
            if x is None:
                return
            x = x.detach()[: sample_size(self.sample, len(x))]
            self.fresh[name] = dbp.patch_gram(x, **patches.window)

        return hook

    @torch.no_grad()
    def _precondition(self, *_: Any) -> None:
        share = max(1 - self.decay, 1 / (self.steps // self.every + 1))
        for name, (module, patches) in self.layers.items():
            weight = module._parameters[patches.weight]
            if name in self.fresh:
                S = parallel.mean(self.fresh.pop(name))
                self.S[name] = self.S[name].lerp(S, share) if name in self.S else S
                self.inverses[name] = self._inverse(name)
            if weight is None or weight.grad is None or name not in self.inverses:
                continue
            groups, D = patches.groups, patches.size
            inverse, gradient = self.inverses[name], weight.grad
            if patches.transposed:
                direction = inverse @ gradient.reshape(groups, D, -1)
            else:
                direction = gradient.reshape(groups, -1, D) @ inverse
            gradient.copy_(direction.reshape(gradient.shape))
        self.steps += 1
        self.due = self.steps % self.every == 0

    def _inverse(self, name: str) -> Tensor:
        """Of S + damping I, (groups, D, D). In float64: S is often singular."""
        S = self.S[name].double()
        if self.decor is not None and name in self.decorrelated:
            R = self.decor.R(name).double()
            S = R @ S @ R.mT
        S = S + self.damping * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        factor, _ = torch.linalg.cholesky_ex(S)
        return torch.cholesky_inverse(factor).to(self.S[name].dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "S": dict(self.S), "inverses": dict(self.inverses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.due = self.steps % self.every == 0
        for name, own in (("S", self.S), ("inverses", self.inverses)):
            own.clear()
            for layer, value in state[name].items():
                weight = self.layers[layer][0]._parameters[self.layers[layer][1].weight]
                assert weight is not None  # it has patches
                own[layer] = value.to(weight.device, copy=True)
