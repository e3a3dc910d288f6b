"""Suite "scaling": the cost of patch_gram as one size of a layer grows, and the planner's prediction.

Four sweeps through one base layer: over the batch, the image (both make n grow), the channels and
the kernel (both make D grow).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from bench.core import bars
from bench.core.plots import COLOURS
from bench.core.registry import Case, compile_filter, conv
from bench.core.suite import Job, Panel, Settings, Suite
from bench.core.table import format_table, milliseconds, short
from bench.suites.kernels import OURS, PLAIN, default_methods, ratio_cell, run_case

# N images of C channels, side x side, and a kernel K x K of stride 1
BASE = {
    "cpu": {"batch": 8, "image": 28, "channels": 32, "kernel": 3},
    "cuda": {"batch": 32, "image": 56, "channels": 64, "kernel": 3},
}
SWEEPS = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "image": (7, 14, 28, 56, 112),
    "channels": (4, 8, 16, 32, 64, 128, 256),
    "kernel": (1, 3, 5, 7, 9, 11),
}
PAIRS = 7


def sweep_cases(device_type: str) -> Iterator[tuple[str, int, Case]]:
    """(what grows, its value, the layer); the base layer is part of every sweep."""
    base = BASE[device_type]
    for what, values in SWEEPS.items():
        for value in values:
            size = {**base, what: value}
            layer = conv(size["batch"], size["channels"], size["image"], size["kernel"])
            yield what, value, layer


def run_scaling_case(
    what: str,
    value: int,
    case: Case,
    settings: Settings,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """The record of the kernels suite, ours and unfold + matmul, with the sweep and its value."""
    methods = default_methods(torch.device(settings.device))
    record = run_case(case, settings, {name: methods[name] for name in (OURS, PLAIN)}, tick)
    return {"sweep": what, "value": value, **record}


def scaling_table(records: Sequence[dict]) -> str:
    """One row a point of a sweep: measured and predicted time, and the exponents in between.

    "grows" is the exponent of n or D (whichever the sweep makes grow) from the row before.
    """
    head = ["sweep", "value", "n", "D", "ours ms [quartiles]", "predicted ms", "predicted/ours"]
    rows = [[*head, "grows", "unfold x", "algorithm"]]
    before = None
    for record in records:
        ours = record["methods"][bars.OURS]
        row = [record["sweep"], str(record["value"]), str(record["n"]), str(record["D"])]
        row.append(milliseconds(ours))
        predicted = record.get("predicted_seconds")
        row.append("-" if predicted is None else short(predicted * 1e3))
        known = predicted is not None and "seconds" in ours
        row.append(f"{predicted / ours['seconds']['median']:.2f}" if known else "-")
        row += [
            _exponent(before, record),
            ratio_cell(record, "unfold"),
            record.get("choice") or "-",
        ]
        rows.append(row)
        before = record
    return format_table(rows)


def _exponent(before: dict | None, record: dict) -> str:
    """The power of n or D with which our time grew, for neighbours in one sweep."""
    if before is None or before["sweep"] != record["sweep"]:
        return "-"
    times = [r["methods"][bars.OURS].get("seconds") for r in (before, record)]
    for size in ("n", "D"):
        if before[size] != record[size] and None not in times:
            ratio = math.log(times[1]["median"] / times[0]["median"])
            return f"{size}^{ratio / math.log(record[size] / before[size]):.2f}"
    return "-"


def plot_scaling(figure, records: Sequence[dict]) -> None:
    """A log-log panel a sweep: ours, unfold + matmul, and the planner's prediction on top."""
    sweeps = list(dict.fromkeys(record["sweep"] for record in records))
    panels = figure.subplots((len(sweeps) + 1) // 2, 2, squeeze=False).flat
    for sweep, axes in zip(sweeps, panels, strict=False):
        points = [record for record in records if record["sweep"] == sweep]
        for name, colour in ((bars.OURS, "#000000"), ("unfold", COLOURS["unfold"])):
            timed = [r for r in points if "seconds" in r["methods"].get(name, {})]
            spreads = [r["methods"][name]["seconds"] for r in timed]
            middle = [s["median"] * 1e3 for s in spreads]
            below = [1e3 * (s["median"] - s["q1"]) for s in spreads]
            above = [1e3 * (s["q3"] - s["median"]) for s in spreads]
            axes.errorbar(
                [r["value"] for r in timed],
                middle,
                (below, above),
                color=colour,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                label="patch_gram" if name == bars.OURS else "unfold + matmul",
            )
        predicted = [r for r in points if "predicted_seconds" in r]
        axes.plot(
            [r["value"] for r in predicted],
            [r["predicted_seconds"] * 1e3 for r in predicted],
            "--",
            color=COLOURS["published"],
            label="planner's prediction",
        )
        values = [record["value"] for record in points]
        axes.set(xscale="log", yscale="log", xlabel=_SWEEP_LABELS.get(sweep, sweep), ylabel="ms")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in list(panels):  # an odd number of sweeps
        axes.set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=3,
        fontsize=8,
        frameon=False,
    )


_SWEEP_LABELS = {
    "batch": "images (n grows)",
    "image": "side of the image (n grows)",
    "channels": "channels (D grows)",
    "kernel": "side of the kernel (D grows)",
}


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    pattern = compile_filter(options.filter)
    settings = replace(settings, pairs=settings.pairs or PAIRS)
    for what, value, case in sweep_cases(options.device.type):
        smallest = value == SWEEPS[what][0]
        if not pattern.search(f"{what} {case.name}") or (options.quick and not smallest):
            continue

        def run(tick, what=what, value=value, case=case):
            return run_scaling_case(what, value, case, settings, tick)

        yield Job("scaling", f"{what} {value}", run, settings.pairs)


def _panels(result: dict) -> Iterator[Panel]:
    records = [r for r in result.get("scaling", ()) if "seconds" in r["methods"][bars.OURS]]
    if records:
        sweeps = len({record["sweep"] for record in records})
        height = 3 * ((sweeps + 1) // 2) + 0.4
        yield Panel(height, lambda part: plot_scaling(part, records))


SUITE = Suite("patch_gram as one size grows", scaling_table, _jobs, _panels)
