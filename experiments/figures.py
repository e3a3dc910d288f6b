"""The pictures of a study's page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import Analysis, Group
from experiments.extras import need
from experiments.records import Record
from experiments.statistics import median
from experiments.study import PlannedRun

# Okabe and Ito's palette, told apart with every common colour blindness; then by line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")
DPI = 110


def pyplot() -> Any:
    matplotlib = need("matplotlib", "matplotlib", "drawing the plots")
    matplotlib.use("Agg")
    return need("matplotlib.pyplot", "matplotlib", "drawing the plots")


def _look(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a line style for each method, the same in all of a study's pictures."""
    n = len(COLOURS)
    return {
        name: {"color": COLOURS[i % n], "linestyle": STYLES[i // n % len(STYLES)]}
        for i, name in enumerate(names)
    }


def plain(axis: Any) -> None:
    axis.grid(True, color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def curve(records: Iterable[Record], column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(runs, evaluations); NaN where a run has no more of them."""
    rows = [[row[column] for row in record.rows] for record in records]
    length = max(map(len, rows), default=0)
    return np.array([r + [math.nan] * (length - len(r)) for r in rows], dtype=np.float64)


def _middle(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Any, Any, Any]:
    """Median, lowest and highest at each evaluation that at least half of the runs have."""
    enough = np.isfinite(values).sum(0) * 2 >= len(values)
    kept = values[:, enough]
    return np.nanmedian(kept, 0), np.nanmin(kept, 0), np.nanmax(kept, 0)


def draw_scores(analysis: Analysis, group: Group, path: Path) -> None:
    """Test score against epochs and against seconds: medians over seeds, and their whole range.

    Controls, which are many, are drawn thinner and without a band.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    look = _look(analysis.study.methods)
    starts, tops = [], []
    for name, line in group.lines.items():
        records = [record for record in line.records.values() if record.rows]
        if not records:
            continue
        control = bool(analysis.study.methods[name].settings_of)
        middle, low, high = _middle(curve(records, "test_score"))
        if not len(middle):
            continue
        starts.append(middle[math.ceil(len(middle) / 10) if len(middle) > 1 else 0])
        tops.append(high.max())
        for axis, column in zip(axes, ("epoch", "seconds"), strict=True):
            x = _middle(curve(records, column))[0][: len(middle)]
            width = 1.1 if control else 2.0
            axis.plot(x, middle, label=name, linewidth=width, **look[name])
            if not control and len(records) > 1:
                band = {"color": look[name]["color"], "alpha": 0.13, "linewidth": 0}
                axis.fill_between(x, low, high, **band)
    for axis, label in zip(axes, ("epoch", "training seconds"), strict=True):
        plain(axis)
        axis.set_xlabel(label)
        if group.target is not None:
            axis.axhline(group.target, color="#444444", linestyle=(0, (1, 2)), linewidth=1.2)
    if starts and max(tops) > min(starts):
        # From where the slowest is after a tenth of its epochs: what matters is above that.
        room = 0.08 * (max(tops) - min(starts))
        axes[0].set_ylim(min(starts) - room, max(tops) + room)
    axes[0].set_ylabel("test score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(plt, figure, path)


def draw_times(analysis: Analysis, group: Group, path: Path) -> None:
    """Every seed's seconds to the target as a dot, medians as bars, misses beyond the dashed line."""
    plt = pyplot()
    lines = list(group.lines.values())
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.42 * len(lines)), layout="constrained")
    look = _look(analysis.study.methods)
    finite = [t for line in lines for t in line.times["seconds"].values() if math.isfinite(t)]
    end = max(finite, default=1.0) * 1.06
    missed = end * 1.06
    for y, line in enumerate(lines):
        colour = look[line.method]["color"]
        times = list(line.times["seconds"].values())
        # Seeds side by side, in their order.
        offsets = np.linspace(-0.22, 0.22, len(times)) if len(times) > 1 else [0.0]
        there = [(t, y + o) for t, o in zip(times, offsets, strict=True) if math.isfinite(t)]
        not_there = [y + o for t, o in zip(times, offsets, strict=True) if not math.isfinite(t)]
        axis.plot(*zip(*there, strict=True), "o", color=colour, markersize=5) if there else None
        axis.plot([missed] * len(not_there), not_there, "x", color=colour, markersize=5)
        middle = median(times)
        if math.isfinite(middle):
            axis.plot([middle, middle], [y - 0.34, y + 0.34], color=colour, linewidth=2.5)
    axis.axvline(end * 1.02, color="#444444", linestyle="--", linewidth=0.9)
    axis.set_xlim(0, missed * 1.04)
    labels = [f"{line.method} ({line.reached}/{len(line.records)})" for line in lines]
    axis.set_yticks(range(len(lines)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("training seconds to the target (x: never reached)")
    plain(axis)
    save(plt, figure, path)


def draw_tuning(analysis: Analysis, group: str, path: Path) -> bool:
    """Validation score of every trial against each setting that was drawn; the chosen are ringed.

    Trials that diverged or failed are crosses at the bottom. Returns whether there was a trial.
    """
    runs = [run for run in analysis.study.tuning_runs() if run.group == group]
    runs = [run for run in runs if run.id in analysis.records]
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    if not keys:
        return False
    plt = pyplot()
    columns = min(3, len(keys))
    height = math.ceil(len(keys) / columns)
    size = (4.2 * columns, 3.4 * height)
    figure, grid = plt.subplots(
        height, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    look = _look(analysis.study.methods)
    last = {run.id: _last_validation(analysis.records[run.id]) for run in runs}
    finite = [value for value in last.values() if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    bottom = low - 0.08 * ((high - low) or 1)
    for axis, key in zip(grid.flat, keys, strict=False):
        _tuning_panel(
            axis, analysis, [r for r in runs if key in r.settings], key, last, bottom, look
        )
    for axis in list(grid.flat)[len(keys) :]:
        axis.set_visible(False)
    for row in grid:
        row[0].set_ylabel("validation score")
    handles: dict[str, Any] = {}
    for axis in grid.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    save(plt, figure, path)
    return True


def _tuning_panel(
    axis: Any,
    analysis: Analysis,
    runs: list[PlannedRun],
    key: str,
    last: dict[str, float],
    bottom: float,
    look: dict[str, dict[str, Any]],
) -> None:
    dimensions = [d for m in analysis.study.methods.values() for d in m.space if d.key == key]
    if any(d.kind == "choice" for d in dimensions):
        order = list(dict.fromkeys(str(value) for d in dimensions for value in d.values))
        axis.set_xticks(range(len(order)), order)
        axis.set_xlim(-0.5, len(order) - 0.5)
        names = list(dict.fromkeys(run.method for run in runs))
        # Beside each other, or they would hide each other.
        shift = dict(zip(names, np.linspace(-0.3, 0.3, len(names)), strict=True))
        places = {r.id: order.index(str(r.settings[key])) + shift[r.method] for r in runs}
    else:
        places = {run.id: float(run.settings[key]) for run in runs}
        low, high = (f(d.values[i] for d in dimensions) for i, f in enumerate((min, max)))
        if all(d.kind == "log" for d in dimensions):
            axis.set_xscale("log")
            axis.minorticks_off()
            ticks = np.geomspace(low, high, 4)
            axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            room = (high / low) ** 0.04
            axis.set_xlim(low / room, high * room)
    for method in dict.fromkeys(run.method for run in runs):
        colour = look[method]["color"]
        own = [run for run in runs if run.method == method]
        winner = analysis.winners.get((own[0].group, method))
        through = [run for run in own if math.isfinite(last[run.id])]
        lost = [run for run in own if not math.isfinite(last[run.id])]
        style: dict[str, Any] = {"color": colour, "linestyle": "none", "markersize": 5}
        style["alpha"] = 0.75  # of two at one place both are seen
        axis.plot(
            [places[r.id] for r in through],
            [last[r.id] for r in through],
            "o",
            label=method,
            **style,
        )
        axis.plot([places[r.id] for r in lost], [bottom] * len(lost), "x", **style)
        rings = [r for r in through if winner is not None and r.trial == winner.trial]
        ring = {**style, "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axis.plot([places[r.id] for r in rings], [last[r.id] for r in rings], "o", **ring)
    axis.set_xlabel(key)
    plain(axis)


def _last_validation(record: Record) -> float:
    finished = record.status == "finished" and record.rows
    return record.rows[-1]["validation_score"] if finished else math.nan
