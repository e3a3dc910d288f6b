"""The picture of a comparison: loss and accuracy against epochs and against seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.extras import need
from experiments.loop import Row
from experiments.report import Report, Summary, mean_curve

# Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = {"bp": "#D55E00", "dbp": "#0072B2"}
NAMES = {"bp": "BP", "dbp": "DBP"}


def plot_report(report: Report, path: Path, title: str) -> None:
    """Writes the PNG. Left: against epochs; right: against training seconds.

    Top: training loss; bottom: test accuracy with BP's best dashed and the median first crossing of
    each method marked. The chosen setting is drawn strongly, with the seeds' range as a band; the
    other settings faintly.
    """
    matplotlib = need("matplotlib", "matplotlib", "drawing the plot")
    matplotlib.use("Agg")
    plt = need("matplotlib.pyplot", "matplotlib", "drawing the plot")

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row", dpi=130)
    figure.suptitle(title, fontsize=12)
    for column in range(2):
        for summary in report.summaries:
            strong = report.chosen[summary.setting.method] is summary
            _draw(axes[0][column], summary, column, strong, lambda row: row.train_loss)
            _draw(axes[1][column], summary, column, strong, lambda row: 100 * row.test_accuracy)
        if report.target is not None:
            _mark_target(axes[1][column], report, column)
        axes[1][column].set_xlabel(
            "epoch" if column == 0 else "training seconds (evaluation excluded)"
        )
        for row in range(2):
            axes[row][column].grid(True, color="#E5E5E5", linewidth=0.8)
            axes[row][column].set_axisbelow(True)
            for side in ("top", "right"):
                axes[row][column].spines[side].set_visible(False)
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("training loss (cross entropy)")
    axes[1][0].set_ylabel("test accuracy (%)")
    _limit_accuracy(axes[1][0], report)
    if report.summaries:
        axes[0][1].legend(loc="upper right", fontsize=8, edgecolor="none", framealpha=0.85)
        axes[1][1].legend(loc="lower right", fontsize=8, edgecolor="none", framealpha=0.85)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw(axis: Any, s: Summary, column: int, strong: bool, value: Callable[[Row], float]) -> None:
    colour = COLOURS[s.setting.method]
    ys = mean_curve(s.runs, value)
    xs = mean_curve(s.runs, (lambda row: row.seconds) if column else (lambda row: row.epoch))
    if not strong:
        axis.plot(xs, ys, color=colour, linewidth=0.9, alpha=0.35, label=_faint_label(axis, s))
        return
    label = f"{NAMES[s.setting.method]}, lr {s.setting.lr:g}"
    if s.setting.decor_lr is not None:
        label += f", decor lr {s.setting.decor_lr:g}"
    label += f" (chosen; {len(s.runs)} seeds)"
    axis.plot(xs, ys, color=colour, linewidth=2.4, label=label, zorder=3)
    if len(s.runs) > 1:
        columns = [[value(run.rows[i]) for run in s.runs] for i in range(len(ys))]
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _faint_label(axis: Any, summary: Summary) -> str | None:
    """One legend entry for all of a method's faint lines."""
    label = f"{NAMES[summary.setting.method]}, other learning rates"
    return None if label in axis.get_legend_handles_labels()[1] else label


def _mark_target(axis: Any, report: Report, column: int) -> None:
    target = 100 * report.target
    axis.axhline(
        target,
        color="#444444",
        linestyle="--",
        linewidth=1,
        label=f"BP's best, {target:.2f} %",
        zorder=1,
    )
    for method, summary in report.chosen.items():
        x = summary.seconds_to_target if column else summary.epochs_to_target
        if math.isfinite(x):
            text = f"{x:.2f} s" if column else f"epoch {x:g}"
            axis.plot(
                [x],
                [target],
                marker="o" if method == "bp" else "D",
                markersize=8,
                color=COLOURS[method],
                markeredgecolor="white",
                linestyle="none",
                label=f"{NAMES[method]} reaches it: {text} (median)",
                zorder=4,
            )


def _limit_accuracy(axis: Any, report: Report) -> None:
    """Starts the accuracy axis where the slower chosen method is after its first tenth of epochs.

    The first epochs would otherwise squeeze the part that matters into a few pixels.
    """
    starts, tops = [], []
    for summary in report.chosen.values():
        curve = mean_curve(summary.runs, lambda row: 100 * row.test_accuracy)
        starts.append(curve[min(len(curve) - 1, math.ceil(len(curve) / 10))])
        tops += [100 * statistics.fmean(summary.best_test), max(curve)]
    if starts and max(tops) > min(starts):
        room = 0.25 * (max(tops) - min(starts))
        axis.set_ylim(max(0.0, min(starts) - room), min(100.5, max(tops) + room))
