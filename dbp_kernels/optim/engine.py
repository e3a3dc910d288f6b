"""The learner of R behind ``dbp.attach``: a DecorUpdate that forms A anew once R has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from dbp_kernels import distributed
from dbp_kernels.optim import sharing
from dbp_kernels.optim.decor_update import DecorUpdate
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.step import Job
from dbp_kernels.optim.swap import form
from dbp_kernels.sampling import Inputs


class Engine(DecorUpdate):
    """``step()`` also puts A = W R into the parameters, in the same CUDA graph if there is one.

    Layers fed by the same tensor share samples and R, and one update; but not with a budget, which
    chooses by layers, nor R with several ranks, of which each would have to know what all have seen.

    Args:
        sites: all of them.
        groups: the same as parameter groups, as for `DecorUpdate`.
        follow_lr: as for `attach`.
        options: as for `DecorUpdate`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        groups: list[dict[str, Any]],
        follow_lr: bool,
        **options: Any,
    ) -> None:
        self._sites = list(sites)
        self._follow_lr = follow_lr
        self._counts: Tensor | None = None  # of the gate: a CUDA graph reads the same one always
        super().__init__(groups, **options)
        self._inputs = Inputs() if self._budget is None else None

    def __getstate__(self) -> dict[str, Any]:
        inputs = None if self._inputs is None else Inputs()
        own = {
            "_sites": self._sites,
            "_follow_lr": self._follow_lr,
            "_counts": None,
            "_inputs": inputs,
        }
        return {**super().__getstate__(), **own}

    @property
    def _in_order(self) -> list[Site]:
        """The sites as jobs count them."""
        return cast("list[Site]", [site for sites in self._layers for site in sites])

    def _jobs(self) -> list[Job]:
        jobs = super()._jobs()
        if self._follow_lr:
            in_order = self._in_order
            for job in jobs:
                job.options["lr"] *= in_order[job.index].lr_share
        if distributed.active(self.process_group):
            self.part(self._sites)
        elif self._inputs is not None:
            jobs = sharing.settle(self._in_order, jobs, self.defaults)
            self._follow_R()
        return jobs

    def part(self, sites: Sequence[Site]) -> None:
        """Give each of the sites an R of its own."""
        sharing.part(sites, self._sites)
        self._follow_R()

    def _turns(self, jobs: list[Job], many: bool) -> list[int]:
        first: dict[int, int] = {}
        for site, phase in zip(self._in_order, super()._turns(jobs, many)):
            first.setdefault(id(site.R), phase)
        return [first[id(site.R)] for site in self._in_order]

    def join(self, sites: Sequence[Site]) -> None:
        """Learn the R of further sites, with the default options."""
        self.add_param_group({"modules": [(site.name, site) for site in sites]})
        self._sites += sites

    def gate(self, found_inf: Sequence[Tensor]) -> None:
        """Have the coming ``step()`` change no R where a GradScaler found Inf, without waiting for it.

        Args:
            found_inf: of each optimiser that was given one, not 0 if its step is to be left out.
        """
        self._gate = None
        if found_inf:
            device = self._sites[0].R.device
            counts = torch.stack([f.to(device).sum() == 0 for f in found_inf]).all()
            if self._counts is None or self._counts.device != device:
                self._counts = counts.clone()
            self._gate = self._counts.copy_(counts)

    def _following(self) -> list[Callable[[], None]]:
        return [partial(form, self._sites)]

    def _followed(self) -> tuple[Hashable, Sequence[Tensor]]:
        gate = None if self._gate is None else self._gate.data_ptr()
        layouts = tuple(site.layout() for site in self._sites)
        return (gate, layouts), [site.weight for site in self._sites]
