"""Layers that are updated at every k-th step take turns, so that no step does the work of all."""

from __future__ import annotations

from collections.abc import Sequence


def phases(costs: Sequence[float], periods: Sequence[int]) -> list[int]:
    """When each layer is due: at steps whose remainder by its period is its phase.

    Layers of one period share the phases out so that their costs are about the same: the dearest
    first, each to the phase that costs least so far.

    Args:
        costs: of an update of each layer, in any unit.
        periods: of each layer, at least 1.
    """
    found = [0] * len(costs)
    load: dict[int, list[float]] = {}
    for layer in sorted(range(len(costs)), key=lambda i: -costs[i]):
        turns = min(periods[layer], len(costs))  # a period may be longer than any training
        spent = load.setdefault(periods[layer], [0.0] * turns)
        found[layer] = phase = spent.index(min(spent))
        spent[phase] += costs[layer]
    return found
