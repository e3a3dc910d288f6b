"""What ``dbp.attach`` returns: the attached sites, what is known of them, and how to stop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbp_kernels import distributed, user_warnings
from dbp_kernels.interrupts import uninterrupted
from dbp_kernels.optim.budget import ScheduleReport
from dbp_kernels.optim.engine import Engine
from dbp_kernels.optim.kinds import Patches, patches_of
from dbp_kernels.optim.optimizer_state import Checkpoint
from dbp_kernels.optim.rounds import Rounds
from dbp_kernels.optim.sharing import users
from dbp_kernels.optim.site import Feed, Site, is_fed
from dbp_kernels.optim.step import Job, plan_of
from dbp_kernels.optim.swap import Swap, some
from dbp_kernels.sampling import recorder_of
from dbp_kernels.surgery import mib, shape_of


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
        waiting: Mapping[str, nn.Module],
    ) -> None:
        self._model, self._optimizers = model, list(optimizers)
        self._sites = {site.name: site for site in sites}
        self._engine = engine
        self._left_alone, self._waiting = dict(left_alone), dict(waiting)
        of = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
        # also of those that have no layer yet: they may get one by add_param_group()
        by_optimizer: dict[int, tuple[torch.optim.Optimizer, list[Site]]] = {
            id(optimizer): (optimizer, []) for optimizer in optimizers
        }
        for site in sites:
            by_optimizer[id(of[id(site.weight)])][1].append(site)
        # before anything is changed: it may refuse what an optimiser has loaded
        self._checkpoints = [Checkpoint(o, own, engine, model) for o, own in by_optimizer.values()]
        self._swaps = [
            Swap(optimizer, own, self._stepped, functools.partial(self._join, own))
            for optimizer, own in by_optimizer.values()
        ]
        self._rounds = Rounds(self._swaps)
        for checkpoint in self._checkpoints:
            checkpoint.register()
        self._hooks = [model.register_forward_pre_hook(_Recovery(self))]
        for site in sites:
            self._feed(site)
        self._attached = True
        self._told_of_unseen = False

    def _feed(self, site: Site) -> None:
        hook = site.module.register_forward_hook(Feed(site), with_kwargs=True)
        self._hooks.append(hook)

    def _join(self, own: list[Site], group: dict[str, Any]) -> None:
        """Attach to layers that have lacked but an optimiser, if a new group of its has their weights.

        Args:
            own: the optimiser's sites, which its swap and checkpoint see too.
            group: the new one.
        """
        held = {id(p) for p in group["params"]}
        sites = []
        for name, module in self._waiting.items() if self._attached else ():
            patches = patches_of(module)
            if not isinstance(patches, Patches) or is_fed(module):
                continue  # what it has become meanwhile
            if id(module._parameters[patches.weight]) in held:
                sites.append(Site(name, module, patches))
        if not sites:
            return
        self._engine.join(sites)
        own += sites
        for site in sites:
            del self._waiting[site.name], self._left_alone[site.name]
            self._sites[site.name] = site
            self._feed(site)
        for checkpoint in self._checkpoints:
            checkpoint.mark()

    def _stepped(self, swap: Swap, *_: Any) -> None:
        """Hook: an optimiser's step() comes to its end."""
        if not swap.is_over():
            return
        behind = [swap]  # whose A is not W R if an error comes
        try:
            stepped = self._rounds.over_with(swap) if swap.sites else []
            if stepped:
                self._tell_of_unseen()
                for other in self._swaps:
                    if other is not swap:
                        other.take_over()
                self._engine.gate([s.found_inf for s in stepped if s.found_inf is not None])
                behind = self._swaps
                self._engine.step()
        except BaseException:
            with uninterrupted():
                for each in behind:
                    each.form()
            raise
        if stepped:
            for each in self._swaps:
                each.formed()
        else:
            swap.form()

    def _tell_of_unseen(self) -> None:
        """Warn, once, where a layer that is due has a gradient but has never handed over a sample."""
        if self._told_of_unseen:
            return
        unseen = [
            site.name
            for place, site, recorder in self._engine._places()
            if isinstance(site, Site)
            and recorder.dtype is None
            and site.weight.grad is not None
            and site.training
            and self._engine._sampling_options(*place) is not None
        ]
        if unseen:
            self._told_of_unseen = True
            user_warnings.warn(
                f"{some(unseen)} got a gradient, but attach() never saw an input of theirs: their R "
                "learns nothing. Either the model was compiled and called before: torch.compile does "
                "not notice hooks that come after the first call, so call torch.compiler.reset(), or "
                "attach() before it. Or their weight is used without calling the layer: exclude them"
            )

    # What it tells.

    def losses(self) -> dict[str, Tensor]:
        """The decorrelation loss of every layer at its most recent update, as ``DecorUpdate``."""
        return self._engine.losses()

    def skipped(self) -> dict[str, Tensor]:
        """How many updates of every layer were left out as not finite, as ``DecorUpdate``."""
        return self._engine.skipped()

    def clipped(self) -> dict[str, Tensor]:
        """How many updates of every layer were made smaller or had rows held, as ``DecorUpdate``."""
        return self._engine.clipped()

    def schedule(self) -> ScheduleReport:
        """What the budget has chosen, as ``DecorUpdate``. Raises RuntimeError without a budget."""
        if self._engine._budget is None:
            raise RuntimeError("there is no budget: expected dbp.attach(budget=...)")
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
        """{layer: R's size, what it takes or whose it is, and by which plan it was updated}.

        The plan is that of the last step's samples, or none before the first; see ``dbp.explain``.
        """
        told = {}
        for first, *others in users(list(self._sites.values())):
            told[first.name] = ", ".join(filter(None, (_size(first.R), self._plan(first))))
            told.update({site.name: f"R is that of {first.name!r}" for site in others})
        return {name: told[name] for name in self._sites}

    def _plan(self, site: Site) -> str | None:
        recorder = recorder_of(site)
        samples = [] if recorder is None else recorder.memory
        if not samples:
            return None
        if distributed.active(self._engine.process_group):
            return "plan gram, of all ranks' samples"
        return f"plan {plan_of(Job(site, samples, self._engine.defaults))}"

    def left_alone(self) -> dict[str, str]:
        """{layer: why it is not decorrelated}."""
        return dict(self._left_alone)

    def transform_gradients(self) -> None:
        """Put dL/dW = (dL/dA) R^T into ``.grad``, where ``backward()`` has put dL/dA.

        ``step()`` does so by itself. Call this after the last backward pass before it, if you want to
        clip or log the gradients of W; the step takes them as they are then. ``zero_grad()`` ends
        it, the optimiser's or the model's.

        Raises RuntimeError after ``detach()``; ``backward()`` does, if it is to add to gradients that
        are those of W already.
        """
        if not self._attached:
            raise RuntimeError(
                "transform_gradients() after detach(): the gradients are the weights'"
            )
        for swap in self._swaps:
            swap.transform_gradients()

    def detach(self) -> None:
        """Stop, for good: the optimiser goes on from the weights A as they are, as without us.

        The handle then tells how things were. Model and optimiser are freed with the last name for
        them, like plain ones; those still attached when Python's garbage collector comes by.
        """
        for swap in self._swaps:
            swap.remove()
        for hook in self._hooks:
            hook.remove()
        for checkpoint in self._checkpoints:
            checkpoint.remove()
        self._engine.detach()
        self._swaps, self._hooks, self._checkpoints = [], [], []
        self._attached = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy that comes with copies of model and optimisers is attached to those."""
        told = self._left_alone, self._waiting
        sites = list(self._sites.values())
        arguments = self._model, self._optimizers, sites, self._engine, *told
        return type(self), arguments, self._attached

    def __setstate__(self, attached: bool) -> None:
        if not attached:
            self.detach()

    def __repr__(self) -> str:
        total = sum(own[0].R.nbytes for own in users(list(self._sites.values())))
        title = f"{type(self).__name__} ({len(self._sites)} layers, R {total / 2**20:.1f} MiB"
        lines = [title + (")" if self._attached else ", detached)")]
        lines += repr(self._engine).splitlines()[1:-1]  # the options
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


def _size(R: Tensor) -> str:
    return f"R {shape_of(R)}, {mib(R):.2f} MiB"
