"""The learning rate over a run, as a multiple of the optimiser's own."""

from __future__ import annotations

import math
from collections.abc import Callable

from experiments.config import ScheduleConfig

# From where "onecycle" rises (Smith & Topin 2018, as in torch's OneCycleLR).
ONECYCLE_START = 1 / 25


def _cosine(share: float) -> float:
    """1 at 0, 0 at 1."""
    return (1 + math.cos(math.pi * share)) / 2


_FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": _cosine,
    "linear": lambda share: 1 - share,
    "onecycle": _cosine,
}


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The multiple at a step, counted from 0, of a run of ``steps``.

    It rises over the first ``warmup * steps`` steps, linearly from next to nothing ("onecycle": by
    a cosine, from 1/25), reaches 1 after them and ``final`` at the last step.

    Raises ValueError for an unknown schedule.
    """
    if schedule.name not in _FALLS:
        raise ValueError(f"schedule.name is {schedule.name!r}: expected one of {list(_FALLS)}")
    rising = round(schedule.warmup * steps)
    if step < rising:
        if schedule.name == "onecycle":
            return 1 - (1 - ONECYCLE_START) * _cosine(step / rising)
        return (step + 1) / (rising + 1)
    if schedule.name == "constant":
        return 1.0
    share = (step - rising) / max(1, steps - 1 - rising)
    return schedule.final + (1 - schedule.final) * _FALLS[schedule.name](share)
