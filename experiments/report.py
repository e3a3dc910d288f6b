"""From the rows of a comparison to a summary: every setting, the chosen ones, times, a verdict.

The rules, fixed before any run:

* A method's learning rates are chosen on validation images only: the highest mean over seeds of a
  run's best-epoch validation accuracy; ties go to the lower mean of its lowest validation loss.
* The target is plain BP's best test accuracy: the highest point of its mean (over seeds) test
  accuracy curve at its chosen learning rate.
* A run reaches the target at the end of the first epoch whose test accuracy is not below it. A
  setting's epochs and seconds are medians over seeds, a run that never gets there counting as
  infinitely late. Both methods are treated alike.
* Seconds are training time only. A difference in epochs or seconds is called one when the medians
  differ by more than 10 % and at least three quarters of the seeds agree, each seed's DBP run against
  its BP run; anything less is a tie. A difference in best test accuracy of at most twice its
  standard error over seeds is a tie.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.configs import Setting
from experiments.loop import Row
from experiments.results import Run

TIE = 0.10
AGREEING_SEEDS = 0.75


@dataclass(frozen=True)
class Summary:
    """One setting over its seeds. Accuracies in [0, 1]; ``math.inf``: not reached."""

    setting: Setting
    runs: list[Run]
    best_validation: list[float]
    lowest_validation_loss: list[float]
    best_test: list[float]
    final_test: list[float]
    final_train_loss: list[float]
    seconds_per_epoch: float
    reached: list[tuple[float, float]]

    @property
    def epochs_to_target(self) -> float:
        return statistics.median(epoch for epoch, _ in self.reached)

    @property
    def seconds_to_target(self) -> float:
        return statistics.median(seconds for _, seconds in self.reached)

    @property
    def seeds_reached(self) -> int:
        return sum(math.isfinite(epoch) for epoch, _ in self.reached)


@dataclass(frozen=True)
class Report:
    """All settings, the chosen one of each method and BP's best test accuracy (the target)."""

    summaries: list[Summary]
    chosen: dict[str, Summary]
    target: float | None
    unfinished: list[Run]


def first_crossing(rows: Sequence[Row], target: float | None) -> tuple[float, float]:
    """(epoch, seconds) of the first row with test accuracy >= target; infinities if there is none.

    A hair's breadth (1e-9) is allowed for, since the target is a mean of such accuracies.
    """
    if target is not None:
        for row in rows:
            if row.test_accuracy >= target - 1e-9:
                return row.epoch, row.seconds
    return math.inf, math.inf


def mean_curve(runs: Sequence[Run], value: Callable[[Row], float]) -> list[float]:
    """Mean over runs at each epoch that all of them have."""
    epochs = min(len(run.rows) for run in runs)
    return [statistics.fmean(value(run.rows[i]) for run in runs) for i in range(epochs)]


def choose(candidates: Sequence[Summary]) -> Summary:
    """The validation rule of this module's head."""
    return max(
        candidates,
        key=lambda s: (
            round(statistics.fmean(s.best_validation), 9),
            -statistics.fmean(s.lowest_validation_loss),
        ),
    )


def build_report(runs: Sequence[Run], epochs: int) -> Report:
    """Applies the rules. Runs with fewer than ``epochs`` epochs are set aside as unfinished."""
    finished = [run for run in runs if len(run.rows) == epochs]
    unfinished = [run for run in runs if len(run.rows) != epochs]
    by_setting: dict[Setting, list[Run]] = {}
    for run in sorted(finished, key=_order):
        by_setting.setdefault(run.setting, []).append(run)

    def summaries(target: float | None) -> list[Summary]:
        return [_summarise(setting, group, target) for setting, group in by_setting.items()]

    plain = [s for s in summaries(None) if s.setting.method == "bp"]
    target = None
    if plain:
        target = max(mean_curve(choose(plain).runs, lambda row: row.test_accuracy))
    final = summaries(target)
    methods = dict.fromkeys(s.setting.method for s in final)
    chosen = {m: choose([s for s in final if s.setting.method == m]) for m in methods}
    return Report(final, chosen, target, unfinished)


def _order(run: Run) -> tuple[str, float, float, int]:
    setting = run.setting
    return setting.method, setting.decor_lr or 0.0, setting.lr, run.seed


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _summarise(setting: Setting, runs: list[Run], target: float | None) -> Summary:
    return Summary(
        setting=setting,
        runs=runs,
        best_validation=[max(r.validation_accuracy for r in run.rows) for run in runs],
        lowest_validation_loss=[
            min(_finite(r.validation_loss, math.inf) for r in run.rows) for run in runs
        ],
        best_test=[max(r.test_accuracy for r in run.rows) for run in runs],
        final_test=[run.rows[-1].test_accuracy for run in runs],
        final_train_loss=[run.rows[-1].train_loss for run in runs],
        seconds_per_epoch=statistics.median(r.epoch_seconds for run in runs for r in run.rows),
        reached=[first_crossing(run.rows, target) for run in runs],
    )


def verdict(report: Report) -> list[str]:
    """Plain sentences: BP against DBP in epochs, in seconds and in best test accuracy."""
    if report.target is None or set(report.chosen) != {"bp", "dbp"}:
        return ["No comparison: it needs finished runs of both bp and dbp."]
    bp, dbp = report.chosen["bp"], report.chosen["dbp"]
    sentences = [
        f"Target: BP's best test accuracy, {report.target:.2%} "
        f"(mean of {len(bp.runs)} seeds, {bp.setting.label()}).",
        _compare("epochs", bp, dbp, lambda point: point[0], "{:g} epochs"),
        _compare("seconds", bp, dbp, lambda point: point[1], "{:.2f} s"),
        _whole_grid(report),
    ]
    difference = statistics.fmean(dbp.best_test) - statistics.fmean(bp.best_test)
    error = math.sqrt(sum(_deviation(s.best_test) ** 2 / len(s.best_test) for s in (bp, dbp)))
    means = (
        f"{statistics.fmean(dbp.best_test):.2%} for DBP, "
        f"{statistics.fmean(bp.best_test):.2%} for BP"
    )
    if min(len(bp.runs), len(dbp.runs)) < 2:
        sentences.append(f"Best test accuracy: {means}; one seed says nothing about the spread.")
    elif abs(difference) <= 2 * error:
        sentences.append(f"Best test accuracy: a tie ({means}).")
    else:
        better = "higher" if difference > 0 else "lower"
        sentences.append(f"Best test accuracy: {better} with DBP ({means}).")
    return sentences


def _compare(
    what: str,
    bp: Summary,
    dbp: Summary,
    value: Callable[[tuple[float, float]], float],
    unit: str,
) -> str:
    """One sentence about the times to target; ``value`` picks epochs or seconds."""
    plain, decorrelated = ([value(point) for point in s.reached] for s in (bp, dbp))
    median_bp, median_dbp = statistics.median(plain), statistics.median(decorrelated)
    seeds = f"{dbp.seeds_reached} of {len(dbp.runs)} DBP seeds reach it"
    head = f"{what.capitalize()} to target:"
    if not math.isfinite(median_bp) and not math.isfinite(median_dbp):
        return f"{head} reached by neither method in the median run."
    if not math.isfinite(median_dbp):
        return f"{head} DBP's median run does not reach it ({seeds})."
    if not math.isfinite(median_bp):
        return (
            f"{head} {unit.format(median_dbp)} with DBP ({seeds}); BP's own median run does not "
            "reach its mean curve's best."
        )
    by_seed = dict(zip([run.seed for run in bp.runs], plain, strict=True))
    pairs = [
        (by_seed[run.seed], time)
        for run, time in zip(dbp.runs, decorrelated, strict=True)
        if run.seed in by_seed
    ]
    earlier = sum(d < b for b, d in pairs)
    later = sum(d > b for b, d in pairs)
    enough = AGREEING_SEEDS * len(pairs)
    numbers = (
        f"median {unit.format(median_dbp)} with DBP, {unit.format(median_bp)} with BP; DBP is "
        f"earlier in {earlier} of {len(pairs)} seeds; {seeds}"
    )
    ratio = median_dbp / median_bp
    if ratio < 1 - TIE and earlier >= enough:
        return f"{head} {1 - ratio:.0%} fewer with DBP ({numbers})."
    if ratio > 1 + TIE and later >= enough:
        return f"{head} {ratio - 1:.0%} more with DBP ({numbers})."
    return f"{head} a tie ({numbers})."


def _whole_grid(report: Report) -> str:
    """The medians of all settings, chosen or not: how much hangs on the choice."""
    parts = []
    for method, name in (("bp", "BP"), ("dbp", "DBP")):
        group = [s for s in report.summaries if s.setting.method == method]
        epochs = [s.epochs_to_target for s in group if math.isfinite(s.epochs_to_target)]
        seconds = [s.seconds_to_target for s in group if math.isfinite(s.seconds_to_target)]
        text = f"{name} reaches it with {len(epochs)} of {len(group)}"
        if epochs:
            text += (
                f", in {min(epochs):g} to {max(epochs):g} epochs and "
                f"{min(seconds):.2f} to {max(seconds):.2f} s"
            )
        parts.append(text)
    return f"Over all settings that were tried (medians): {'; '.join(parts)}."


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    mean = statistics.fmean(values) * scale
    if not abs(mean) < 1e4:  # a diverged run's loss, NaN and infinity included
        return f"{mean:.2g}"
    text = f"{mean:.{digits}f}"
    return f"{text} ± {_deviation(values) * scale:.{digits}f}" if len(values) > 1 else text


def _or_not(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "not reached"


HEADERS = (
    "method",
    "lr",
    "decor lr",
    "seeds",
    "validation % (best)",
    "test % (best)",
    "test % (last)",
    "train loss (last)",
    "s/epoch",
    "epochs to target",
    "seconds to target",
    "chosen",
)


def summary_table(report: Report) -> list[list[str]]:
    """One line of cells for every setting, after ``HEADERS``: mean ± deviation over seeds."""
    lines = []
    for s in report.summaries:
        lines.append(
            [
                s.setting.method,
                f"{s.setting.lr:g}",
                "" if s.setting.decor_lr is None else f"{s.setting.decor_lr:g}",
                str(len(s.runs)),
                _spread(s.best_validation),
                _spread(s.best_test),
                _spread(s.final_test),
                _spread(s.final_train_loss, 1, 4),
                f"{s.seconds_per_epoch:.3f}",
                f"{_or_not(s.epochs_to_target, 'g')} ({s.seeds_reached}/{len(s.runs)})",
                _or_not(s.seconds_to_target, ".2f"),
                "*" if report.chosen[s.setting.method] is s else "",
            ]
        )
    return lines


RUN_HEADERS = (
    "method",
    "lr",
    "decor lr",
    "seed",
    "validation % (best)",
    "test % (best)",
    "test % (last)",
    "train loss (last)",
    "epochs to target",
    "seconds to target",
    "training seconds",
)


def run_table(report: Report) -> list[list[str]]:
    """One line of cells for every finished run, after ``RUN_HEADERS``."""
    lines = []
    for s in report.summaries:
        for i, run in enumerate(s.runs):
            epoch, seconds = s.reached[i]
            lines.append(
                [
                    s.setting.method,
                    f"{s.setting.lr:g}",
                    "" if s.setting.decor_lr is None else f"{s.setting.decor_lr:g}",
                    str(run.seed),
                    f"{100 * s.best_validation[i]:.2f}",
                    f"{100 * s.best_test[i]:.2f}",
                    f"{100 * s.final_test[i]:.2f}",
                    _spread([s.final_train_loss[i]], 1, 4),
                    _or_not(epoch, "g"),
                    _or_not(seconds, ".2f"),
                    f"{run.rows[-1].seconds:.2f}",
                ]
            )
    return lines


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned table that reads as plain text and renders as markdown."""
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]

    def render(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([render(headers), rule, *map(render, lines)])


def terminal_text(report: Report) -> str:
    """What the command line prints at the end: the table of settings and the verdict."""
    parts = []
    if report.summaries:
        parts.append(markdown_table(HEADERS, summary_table(report)))
        parts.append("* chosen on validation images; every learning rate that was tried is shown.")
    if report.unfinished:
        parts.append(f"Left out: {len(report.unfinished)} unfinished run(s); go on with --resume.")
    return "\n\n".join([*parts, "\n".join(verdict(report))])


def markdown_text(report: Report, title: str, details: str) -> str:
    """``summary.md``: verdict, settings, every run, and the rules by which all this was decided."""
    rules = (__doc__ or "").split("\n\n", 1)[1].strip()
    parts = [f"# {title}", details, "\n".join(f"- {line}" for line in verdict(report))]
    parts.append("![Loss and accuracy against epochs and seconds](curves.png)")
    if report.summaries:
        parts += ["## Settings (mean ± deviation over seeds; * chosen)"]
        parts += [markdown_table(HEADERS, summary_table(report))]
        parts += ["## Every run", markdown_table(RUN_HEADERS, run_table(report))]
    if report.unfinished:
        names = ", ".join(f"{r.setting.label()} seed {r.seed}" for r in report.unfinished)
        parts.append(f"Unfinished, left out: {names}.")
    return "\n\n".join([*parts, "## How this was decided", rules]) + "\n"
