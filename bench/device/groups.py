"""The table of stages: which there are, in what order, and how long each group of them may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.device import (
    calibration,
    correctness,
    describe,
    layers,
    matrices,
    sanitizer,
    steps,
    suite,
    train,
    tuning,
)
from bench.device.stage import Stage


@dataclass(frozen=True)
class Group:
    """Stages for one visit to a machine, the most telling first; ``seconds``: the most it may take."""

    seconds: float
    stages: tuple[Stage, ...]


GROUPS: dict[str, Group] = {
    "first": Group(
        150,
        (
            correctness.CHECKS,
            layers.TIMES,
            matrices.TIMES,
            steps.RATIOS,
            correctness.CONFIGURATIONS,
        ),
    ),
    "rest": Group(
        320,
        (
            tuning.COMPILATION,  # first: the machine may be a new one, whose cache of kernels is empty
            layers.LAYERS,
            steps.STEPS,
            calibration.CALIBRATION,
            tuning.TUNING,
            sanitizer.SANITIZER,
            suite.TESTS,
        ),
    ),
    "train": Group(400, (train.TRAINING,)),
}
DESCRIBE = describe.DESCRIBE  # comes first in every run


def find(name: str) -> Stage:
    """The stage of this name. Raises KeyError for another name."""
    return {stage.name: stage for stage in (DESCRIBE, *all_stages())}[name]


def all_stages() -> list[Stage]:
    """Of all groups, in their order."""
    return [stage for group in GROUPS.values() for stage in group.stages]


def chosen(groups: Sequence[str], stages: Sequence[str]) -> list[Group]:
    """The named groups, or all that have stages; of these only the named stages, if any are.

    Raises ValueError for a name that there is not, and if nothing is left.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"no group {min(unknown)!r}: expected some of {', '.join(GROUPS)}")
    names = [stage.name for stage in all_stages()]
    for stage in stages:
        if stage not in names:
            raise ValueError(f"no stage {stage!r}: expected some of {', '.join(names)}")
    found = [
        Group(group.seconds, tuple(s for s in group.stages if not stages or s.name in stages))
        for name, group in GROUPS.items()
        if not groups or name in groups
    ]
    found = [group for group in found if group.stages]
    if not found:
        raise ValueError(f"no stage to run in {', '.join(groups or GROUPS)}")
    return found
