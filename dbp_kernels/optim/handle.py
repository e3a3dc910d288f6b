"""What ``dbp.attach`` returns: the attached sites, what is known of them, and how to stop."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbp_kernels.optim.budget import ScheduleReport
from dbp_kernels.optim.engine import Engine
from dbp_kernels.optim.optimizer_state import Checkpoint
from dbp_kernels.optim.sharing import users
from dbp_kernels.optim.site import Feed, Site
from dbp_kernels.optim.swap import Swap, form


class Attached:
    """Decorrelation that is learnt beside an optimiser; made by ``dbp.attach``.

    ``print()`` says which layers are attached, and which are not and why.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        sites: Sequence[Site],
        engine: Engine,
        left_alone: Mapping[str, str],
    ) -> None:
        self._model, self._optimizers = model, list(optimizers)
        self._sites = {site.name: site for site in sites}
        self._engine = engine
        self._left_alone = dict(left_alone)
        of = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
        by_optimizer: dict[int, tuple[torch.optim.Optimizer, list[Site]]] = {}
        for site in sites:
            optimizer = of[id(site.weight)]
            by_optimizer.setdefault(id(optimizer), (optimizer, []))[1].append(site)
        # R is updated with the last of several optimisers that the model has
        *rest, last = by_optimizer.values()
        self._swaps = [Swap(o, own, lambda own=own: form(own)) for o, own in rest]
        self._swaps.append(Swap(*last, after=self._learn))
        self._checkpoints = [Checkpoint(o, own, engine) for o, own in by_optimizer.values()]
        self._hooks = [
            site.module.register_forward_hook(Feed(site), with_kwargs=True) for site in sites
        ]
        self._hooks.append(model.register_forward_pre_hook(_Recovery(self)))
        self._attached = True

    def _learn(self) -> None:
        self._engine.gate([s.found_inf for s in self._swaps if s.found_inf is not None])
        self._engine.step()
        for site in self._sites.values():
            site.formed()

    # What it tells.

    def losses(self) -> dict[str, Tensor]:
        """The decorrelation loss of every layer at its most recent update, as ``DecorUpdate``."""
        return self._engine.losses()

    def skipped(self) -> dict[str, Tensor]:
        """How many updates of every layer were left out as not finite, as ``DecorUpdate``."""
        return self._engine.skipped()

    def schedule(self) -> ScheduleReport:
        """What the budget has chosen, as ``DecorUpdate``. Raises RuntimeError without a budget."""
        return self._engine.schedule()

    def R(self, name: str) -> Tensor:
        """The layer's R itself: (D, D), or (groups, D, D) with groups > 1. Not to be written to.

        Layers that share R have the same tensor; where they are told apart, one gets another.
        Raises KeyError if no layer of this name is attached.
        """
        return self._site(name).R

    def W(self, name: str) -> Tensor:
        """The layer's W itself, in the shape of its weight. Raises KeyError as ``R``."""
        return self._site(name).W

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            raise KeyError(f"no layer {name!r} is attached: expected one of {list(self._sites)}")
        return self._sites[name]

    def decorrelated(self) -> dict[str, str]:
        """{layer: its groups, size and what R takes, or with which layer it shares R}."""
        told = {}
        for first, *others in users(list(self._sites.values())):
            size = f"R {' x '.join(map(str, first.R.shape))}"
            told[first.name] = f"{size}, {_mib(first.R)}"
            told.update((site.name, f"{size}, that of {first.name!r}") for site in others)
        return {name: told[name] for name in self._sites}

    def left_alone(self) -> dict[str, str]:
        """{layer: why it is not decorrelated}."""
        return dict(self._left_alone)

    def transform_gradients(self) -> None:
        """Put dL/dW = (dL/dA) R^T into ``.grad``, where ``backward()`` has put dL/dA.

        ``step()`` does so by itself. Call this after the last backward pass before it, if you want to
        clip or log the gradients of W; the step takes them as they are then. ``zero_grad()`` ends it.
        """
        for swap in self._swaps:
            swap.transform_gradients()

    def detach(self) -> None:
        """Stop, for good: the optimiser goes on from the weights A as they are, as without us."""
        for swap in self._swaps:
            swap.remove()
        for handle in (*self._hooks, *self._checkpoints):
            handle.remove()
        self._engine.detach()
        self._attached = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy that comes with copies of model and optimisers is attached to those."""
        sites, left_alone = list(self._sites.values()), self._left_alone
        arguments = self._model, self._optimizers, sites, self._engine, left_alone
        return type(self), arguments, self._attached

    def __setstate__(self, attached: bool) -> None:
        if not attached:
            self.detach()

    def __repr__(self) -> str:
        total = sum(own[0].R.nbytes for own in users(list(self._sites.values())))
        title = f"{type(self).__name__} ({len(self._sites)} layers, R {total / 2**20:.1f} MiB"
        lines = [title + (")" if self._attached else ", detached)")]
        lines += [f"  {name}: {told}" for name, told in self.decorrelated().items()]
        if self._left_alone:
            lines.append("left alone:")
            lines += [f"  {name}: {why}" for name, why in self._left_alone.items()]
        return "\n".join(lines)


class _Recovery:
    """A forward hook of the model: A is back, if a step was left by an exception nobody told us of.

    A copy of the model has copies of its hooks: those do nothing.
    """

    def __init__(self, attached: Attached | None) -> None:
        self._attached = None if attached is None else weakref.ref(attached)

    def __call__(self, *_: Any) -> None:
        attached = None if self._attached is None else self._attached()
        for swap in () if attached is None else attached._swaps:
            swap.recover_if_left()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recovery:
        return _Recovery(None)

    def __reduce__(self) -> tuple[type[_Recovery], tuple[None]]:
        return _Recovery, (None,)


def _mib(x: Tensor) -> str:
    return f"{x.nbytes / 2**20:.2f} MiB"
