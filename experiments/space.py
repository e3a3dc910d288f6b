"""The space that a study's trials are drawn from, by a quasi-random sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.extras import need

KINDS = ("log", "linear", "choice")


@dataclass(frozen=True)
class Dimension:
    """One setting that a method tries: ``key`` is its place in the configuration, with dots.

    ``kind`` "log" and "linear" take two bounds, "choice" a list of values.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, key: str, declared: Any) -> Dimension:
        """From ``{log: [lo, hi]}``, ``{linear: [lo, hi]}`` or ``{choice: [...]}``."""
        if not isinstance(declared, Mapping) or len(declared) != 1:
            raise ValueError(
                f"space of {key} must be one of {KINDS} with its values, got {declared!r}"
            )
        ((kind, values),) = declared.items()
        if kind not in KINDS or not isinstance(values, list) or not values:
            raise ValueError(
                f"space of {key} must be one of {KINDS} with its values, got {declared!r}"
            )
        if kind == "choice":
            return cls(key, kind, tuple(values))
        try:
            low, high = map(float, values)
        except (TypeError, ValueError):
            raise ValueError(f"space of {key}: {kind} takes two numbers, got {values!r}") from None
        if not low < high or not math.isfinite(high - low) or (kind == "log" and low <= 0):
            positive = "0 < low < high" if kind == "log" else "low < high"
            raise ValueError(f"space of {key}: {kind} takes {positive}, got {values!r}")
        return cls(key, kind, (low, high))

    def at(self, u: float) -> Any:
        """The value at ``u`` in [0, 1); numbers are rounded to three significant digits."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        logarithmic = self.kind == "log"
        value = low * (high / low) ** u if logarithmic else low + (high - low) * u
        return float(f"{value:.3g}")

    def at_edge(self, value: Any) -> bool:
        """Whether a number is within a tenth of either end, so that a wider range might be better."""
        if self.kind == "choice":
            return False
        low, high = self.values
        if self.kind == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        return not 0.1 <= (value - low) / (high - low) <= 0.9


def draws(
    spaces: Mapping[str, Sequence[Dimension]], trials: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """``trials`` settings for each method: a scrambled Sobol sequence with one axis for each key.

    A key that several methods try is one axis: in trial t all of them stand at the same place of
    it (each within its own bounds), so that no method has luckier draws than another.
    """
    keys = list(dict.fromkeys(d.key for space in spaces.values() for d in space))
    if not keys:
        return {name: [] for name in spaces}
    qmc = need("scipy.stats.qmc", "scipy", "drawing a study's trials")
    # In powers of two, as the sequence is balanced in no other length.
    sequence = qmc.Sobol(len(keys), scramble=True, rng=np.random.default_rng(seed))
    points = sequence.random_base2(math.ceil(math.log2(trials)))[:trials]
    column = {key: i for i, key in enumerate(keys)}
    return {
        name: [{d.key: d.at(point[column[d.key]]) for d in space} for point in points]
        if space
        else []
        for name, space in spaces.items()
    }
