"""The learner of R behind ``dbp.attach``: a DecorUpdate that forms A anew once R has changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.optim.decor_update import DecorUpdate
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.swap import form


class Engine(DecorUpdate):
    """``step()`` also puts A = W R into the parameters, in the same CUDA graph if there is one.

    Args:
        sites: all of them.
        groups: the same as parameter groups, as for `DecorUpdate`.
        options: as for `DecorUpdate`.
    """

    def __init__(self, sites: Sequence[Site], groups: list[dict[str, Any]], **options: Any) -> None:
        self._sites = list(sites)
        self._counts: Tensor | None = None  # of the gate: a CUDA graph reads the same one always
        super().__init__(groups, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sites": self._sites, "_counts": None}

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

    def _follow(self) -> None:
        form(self._sites)

    def _followed(self) -> tuple[Hashable, Sequence[Tensor]]:
        gate = None if self._gate is None else self._gate.data_ptr()
        layouts = tuple(site.layout() for site in self._sites)
        return (gate, layouts), [site.weight for site in self._sites]
