"""What a study's final runs say: targets, times to them, comparisons. Numbers only, no text.

The rules, fixed before any run, beside those of ``experiments.choice`` and ``experiments.statistics``:

* A run's final score is its test score at the last evaluation; that of a run that diverged or failed
  is the worst possible. Where a method chose its number of epochs, it is that of runs of its own
  length.
* A group's target is the final score that the best of its baselines reaches with half of its seeds
  or more: the lower median, of the baseline for which it is the highest. That baseline is what all
  others are compared with.
* Against others a run of the baseline that ends below the target, which the target makes common,
  counts as if it had been reached with its last step: that can only make a method look slower.
* A control is compared, besides, with the method whose settings it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.choice import winners
from experiments.records import Record
from experiments.statistics import (
    Comparison,
    compare_scores,
    compare_times,
    low_median,
    median,
    median_interval,
    time_to,
)
from experiments.study import Study, Winner

# What a time may be counted in, and the column of an evaluation that counts it.
UNITS = {"seconds": "seconds", "epochs": "epoch", "examples": "examples", "TFLOP": "step"}


@dataclass(frozen=True)
class Line:
    """A method's final runs in one group.

    Attributes:
        scores: final score by seed.
        times: by unit (``UNITS``), then by seed; a unit that no run tells is left out.
        against_baseline, against_parent: by unit, and "score"; the parent is the method that a
            control has its settings of.
    """

    method: str
    winner: Winner
    records: dict[int, Record]
    scores: dict[int, float]
    times: dict[str, dict[int, float]]
    against_baseline: dict[str, Comparison] = field(default_factory=dict)
    against_parent: dict[str, Comparison] = field(default_factory=dict)

    @property
    def reached(self) -> int:
        return sum(math.isfinite(time) for time in self.times["seconds"].values())

    def score(self) -> tuple[float, tuple[float, float] | None]:
        """Median and its interval."""
        values = list(self.scores.values())
        return median(values), median_interval(values)

    def fact(self, name: str) -> float:
        """Median of a number about whole runs; NaN if none tells."""
        known = [r.facts[name] for r in self.records.values() if name in r.facts]
        return median(known) if known else math.nan

    def time(self, unit: str) -> tuple[float, tuple[float, float] | None]:
        """Median and its interval."""
        values = list(self.times[unit].values())
        return median(values), median_interval(values)


@dataclass(frozen=True)
class Group:
    """``target`` and ``baseline`` are None while no baseline has a final run."""

    name: str
    lines: dict[str, Line]
    target: float | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Analysis:
    """``missing``: runs that the study declares and that are not over; ``superseded``: runs that it
    made and no longer declares, as its configuration or a winner has changed since."""

    study: Study
    records: dict[str, Record]
    winners: dict[tuple[str, str], Winner]
    groups: list[Group]
    missing: int
    superseded: list[str]


def analyse(study: Study, records: dict[str, Record], folder: Path) -> Analysis:
    """``folder`` is the study's, which another one's may lie beside (``winners_from``)."""
    tuning = {planned.id for planned in study.tuning_runs()}
    missing = sum(run not in records or not records[run].over for run in tuning)
    per_seed = len(study.methods) * len(study.groups)
    if missing:
        missing += per_seed * len(study.final_seeds)
        superseded = [run for run, r in records.items() if run not in tuning]
        return Analysis(study, records, {}, [], missing, superseded)
    chosen = winners(study, records, folder)
    declared: dict[tuple[str, str], dict[int, Record]] = {key: {} for key in chosen}
    known = set(tuning)
    for planned in study.final_runs(chosen):
        known.add(planned.id)
        record = records.get(planned.id)
        if record is None or not record.over:
            missing += 1
        else:
            declared[planned.group, planned.method][planned.seed] = record
    groups = [_group(study, name, chosen, declared) for name in study.groups]
    superseded = [run for run in records if run not in known]
    return Analysis(study, records, chosen, groups, missing, superseded)


def final_score(record: Record) -> float:
    """-inf for a run that did not come through."""
    if record.status != "finished" or not record.rows:
        return -math.inf
    score = record.rows[-1]["test_score"]
    return -math.inf if math.isnan(score) else score


def times_of(record: Record) -> dict[str, list[float]]:
    """When its evaluations were, by unit; not a number where FLOPs are not known."""
    scales = {"TFLOP": record.facts.get("flops_per_step", math.nan) / 1e12}
    return {
        unit: [row[column] * scales.get(unit, 1.0) for row in record.rows]
        for unit, column in UNITS.items()
    }


def times_to(record: Record, target: float) -> dict[str, float]:
    """By unit. A run that diverges later has reached the target all the same if it had it before."""
    scores = [row["test_score"] for row in record.rows]
    return {unit: time_to(times, scores, target) for unit, times in times_of(record).items()}


def _group(
    study: Study,
    name: str,
    chosen: Mapping[tuple[str, str], Winner],
    declared: Mapping[tuple[str, str], dict[int, Record]],
) -> Group:
    scores = {
        method: {seed: final_score(record) for seed, record in declared[name, method].items()}
        for method in study.methods
        if declared.get((name, method))
    }
    reached = {
        m: low_median(list(s.values())) for m, s in scores.items() if study.methods[m].baseline
    }
    baseline = max(reached, key=lambda m: reached[m], default=None)
    target = None if baseline is None else reached[baseline]
    if target is not None and not math.isfinite(target):  # half of its runs did not come through
        baseline = target = None
    lines = {}
    for method, values in scores.items():
        records = declared[name, method]
        times: dict[str, dict[int, float]] = {}
        for seed, record in records.items():
            found = times_to(record, math.inf if target is None else target)
            for unit, time in found.items():
                times.setdefault(unit, {})[seed] = time
        if any(math.isnan(time) for time in times["TFLOP"].values()):
            del times["TFLOP"]
        lines[method] = Line(method, chosen[name, method], records, values, times)
    for method, line in lines.items():
        if baseline is not None and method != baseline:
            line.against_baseline.update(_compare(line, _at_most_all(lines[baseline])))
        parent = line.winner.method
        if parent != method and parent in lines:
            line.against_parent.update(_compare(line, lines[parent]))
    return Group(name, lines, target, baseline)


def _at_most_all(line: Line) -> Line:
    """The baseline's line with its misses taken for the whole runs; lost runs are never there."""
    times = {unit: dict(by_seed) for unit, by_seed in line.times.items()}
    for seed, record in line.records.items():
        if record.status == "finished":
            whole = times_of(record)
            for unit, by_seed in times.items():
                by_seed[seed] = min(by_seed[seed], whole[unit][-1])
    return replace(line, times=times)


def _compare(line: Line, other: Line) -> dict[str, Comparison]:
    if not set(line.scores) & set(other.scores):
        return {}
    found = {"score": compare_scores(line.scores, other.scores)}
    for unit in line.times:
        if unit in other.times:
            found[unit] = compare_times(line.times[unit], other.times[unit])
    return found
