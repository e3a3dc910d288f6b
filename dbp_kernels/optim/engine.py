"""The learner of R behind ``dbp.attach``: a DecorUpdate that forms A anew once R has changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from dbp_kernels.optim.site import Site
from dbp_kernels.optim.swap import form
from dbp_kernels.update import DecorUpdate


class Engine(DecorUpdate):
    """``step()`` also puts A = W R into the parameters, in the same CUDA graph if there is one.

    Args:
        sites: all of them.
        groups: the same as parameter groups, as for `DecorUpdate`.
        options: as for `DecorUpdate`.
    """

    def __init__(self, sites: Sequence[Site], groups: list[dict[str, Any]], **options: Any) -> None:
        self._sites = list(sites)
        super().__init__(groups, **options)

    def _follow(self) -> None:
        form(self._sites)

    def _followed(self) -> tuple[Hashable, Sequence[Tensor]]:
        return tuple(site.layout() for site in self._sites), [s.parameter for s in self._sites]
