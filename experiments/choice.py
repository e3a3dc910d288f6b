"""Which of a method's trials is taken: by validation alone, by one rule for all methods.

* ``last``: the highest score at the last evaluation, mean over the tuning seeds.
* ``best``: the highest score at any evaluation.
* ``earliest``: the fewest training seconds to the best baseline's score, which is the highest last
  score of any baseline's trial; trials that do not get there follow by their last score.
* Ties go to the lower validation loss at the last evaluation, then to the earlier trial. A trial that
  diverged or failed is below all others, and counts as one of the method's trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from experiments.records import Record, read
from experiments.statistics import time_to
from experiments.study import Method, PlannedRun, Study, Winner, merge

Trial = list[tuple[PlannedRun, Record]]
LOST = (-math.inf, -math.inf)


def winners(
    study: Study, records: Mapping[str, Record], folder: Path
) -> dict[tuple[str, str], Winner]:
    """By (group, method). A method none of whose trials came through has none.

    Args:
        folder: the study's own; that of the study named by ``winners_from`` lies beside it.

    Raises:
        ValueError: a tuning run, here or in the study named by ``winners_from``, is not over.
    """
    taken: dict[tuple[str, str], Winner] = {}
    if study.winners_from:
        taken = _taken(study, folder.parent / study.winners_from)
    trials = _trials(study, records)
    found: dict[tuple[str, str], Winner] = {}
    for group in study.groups:
        target = _baselines_score(study, group, trials) if study.select == "earliest" else math.inf
        for method in study.methods.values():
            if method.settings_of:
                continue
            if study.winners_from:
                found[group, method.name] = _take(study, group, method, taken)
            elif method.space:
                winner = _best(study, group, method, trials[group, method.name], target)
                if winner:
                    found[group, method.name] = winner
            else:
                config = study.config(group, method)
                found[group, method.name] = Winner(method.name, None, {}, config)
        for method in study.methods.values():
            parents = [found[group, p] for p in method.settings_of if (group, p) in found]
            if parents:
                parent = max(parents, key=lambda winner: winner.merit)
                config = merge(parent.config, method.changes)
                found[group, method.name] = Winner(
                    parent.method, parent.trial, parent.settings, config, parent.merit
                )
    return found


def _trials(study: Study, records: Mapping[str, Record]) -> dict[tuple[str, str], list[Trial]]:
    by_trial: dict[tuple[str, str], dict[int, Trial]] = {}
    for planned in study.tuning_runs():
        record = records.get(planned.id)
        if record is None or not record.over:
            raise ValueError(f"study {study.name}: tuning is not over; to do: {planned.id}")
        group = by_trial.setdefault((planned.group, planned.method), {})
        group.setdefault(planned.trial or 0, []).append((planned, record))
    return {key: list(trials.values()) for key, trials in by_trial.items()}


def _came_through(trial: Trial) -> bool:
    return all(record.status == "finished" and record.rows for _, record in trial)


def _last(trial: Trial) -> float:
    """Mean of the last validation scores; -inf for a lost trial."""
    if not _came_through(trial):
        return -math.inf
    score = fmean(r.rows[-1]["validation_score"] for _, r in trial)
    return -math.inf if math.isnan(score) else score


def _baselines_score(
    study: Study, group: str, trials: Mapping[tuple[str, str], list[Trial]]
) -> float:
    names = [m.name for m in study.methods.values() if m.baseline and m.space]
    scores = [_last(trial) for name in names for trial in trials.get((group, name), [])]
    return max(scores, default=math.inf)


def merit(study: Study, trial: Trial, target: float) -> tuple[float, float]:
    """The larger the better: this module's head."""
    last = _last(trial)
    if last == -math.inf:
        return LOST
    loss = fmean(record.rows[-1]["validation_loss"] for _, record in trial)
    second = -math.inf if math.isnan(loss) else -loss
    if study.select == "last":
        return last, second
    curves = [[row["validation_score"] for row in r.rows] for _, r in trial]
    if study.select == "best":
        return fmean(max(curve) for curve in curves), second
    seconds = [[row["seconds"] for row in record.rows] for _, record in trial]
    times = [time_to(s, curve, target) for s, curve in zip(seconds, curves, strict=True)]
    return -fmean(times), last


def _best(
    study: Study, group: str, method: Method, trials: list[Trial], target: float
) -> Winner | None:
    merits = [merit(study, trial, target) for trial in trials]
    best = max(range(len(trials)), key=lambda i: (merits[i], -i))
    if merits[best] == LOST:
        return None
    planned = trials[best][0][0]
    config = merge(study.config(group, method), planned.settings)
    return Winner(method.name, planned.trial, planned.settings, config, merits[best])


def _taken(study: Study, folder: Path) -> dict[tuple[str, str], Winner]:
    try:
        other, records = read(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"study {study.name} takes its settings from {folder.name}: {error}"
        ) from None
    common = set(other.tuning_seeds) & set(study.final_seeds)
    if common:
        raise ValueError(f"study {study.name}: final_seeds {sorted(common)} tuned {other.name}")
    return winners(other, records, folder)


def _take(
    study: Study, group: str, method: Method, taken: Mapping[tuple[str, str], Winner]
) -> Winner:
    """The other study's winner of the same group, or of its only one."""
    found = taken.get((group, method.name)) or taken.get(("", method.name))
    if found is None:
        raise ValueError(
            f"study {study.name}: {study.winners_from} has no winner for {method.name} {group}".rstrip()
        )
    config = merge(study.config(group, method), found.settings)
    return Winner(method.name, found.trial, found.settings, config, found.merit)
