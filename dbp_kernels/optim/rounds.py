"""When R learns, where a model has several optimisers."""

from __future__ import annotations

from collections.abc import Sequence

from dbp_kernels.optim.site import GradientSeen, Site
from dbp_kernels.optim.swap import Swap


class Rounds:
    """A round is over when all optimisers have made their step that have gradients to make it by.

    R learns then, and not before: dL/dW = dL/dA R^T needs the R that dL/dA was taken with. An
    optimiser that lets another step twice rests: nobody waits for it until it steps again.

    Args:
        swaps: one for each optimiser.
    """

    def __init__(self, swaps: Sequence[Swap]) -> None:
        self._swaps = swaps
        self._stepped: list[Swap] = []  # in this round
        self._resting: list[Swap] = []
        self._taken: dict[Site, GradientSeen | None] = {}  # the gradients of the last steps

    def over_with(self, swap: Swap) -> list[Swap]:
        """All that have stepped in the round that this one's step ends; none if it ends none."""
        if len(self._swaps) == 1:
            return [swap]
        self._taken.update({site: site._gradient() for site in swap.sites})
        self._resting = [other for other in self._resting if other is not swap]
        awaited = [other for other in self._swaps if self._is_awaited(other)]
        if awaited and swap not in self._stepped:
            self._stepped.append(swap)
            return []
        over, self._stepped = [*self._stepped, swap], []
        self._resting += awaited
        return over

    def _is_awaited(self, swap: Swap) -> bool:
        return swap not in self._resting and any(map(self._is_new, swap.sites))

    def _is_new(self, site: Site) -> bool:
        gradient = site._gradient()
        return gradient is not None and gradient != self._taken.get(site)
