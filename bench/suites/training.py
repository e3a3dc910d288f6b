"""Table and plot of trainings: records of epochs, by method."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.core.suite import Panel, Suite
from bench.core.table import format_table, short


def by_method(records: Sequence[dict]) -> dict[str, list[dict]]:
    """{method: its epochs in order}."""
    methods = dict.fromkeys(record["method"] for record in records)
    ordered = sorted(records, key=lambda record: record["epoch"])
    return {method: [r for r in ordered if r["method"] == method] for method in methods}


def training_table(records: Sequence[dict]) -> str:
    """One row a method: its speed, its last epoch, accuracies of all epochs."""
    rows = [["method", "epochs", "images/s", "s", "loss", "decorrelation loss", "accuracy, %"]]
    for method, epochs in by_method(records).items():
        last = epochs[-1]
        speed = statistics.median(record["images_per_second"] for record in epochs)
        decorrelation = last["decorrelation_loss"]
        row = [method, f"{last['epoch']} of {last['epochs']}", f"{speed:.0f}"]
        row += [short(last["seconds"]), f"{last['train_loss']:.3f}"]
        row += ["-" if decorrelation is None else f"{decorrelation:.3g}"]
        rows.append([*row, " ".join(f"{100 * r['test_accuracy']:.1f}" for r in epochs)])
    return format_table(rows)


def plot_training(part, records: Sequence[dict]) -> None:
    """Test accuracy against epochs and against seconds, into a subfigure."""
    left, right = part.subplots(1, 2, sharey=True)
    for method, epochs in by_method(records).items():
        accuracies = [100 * record["test_accuracy"] for record in epochs]
        for axes, key in ((left, "epoch"), (right, "seconds")):
            axes.plot([record[key] for record in epochs], accuracies, "o-", label=method)
    left.set_ylabel("test accuracy, %")
    for axes, label in ((left, "epochs"), (right, "seconds of training")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.legend()


def _panels(result: dict) -> Iterator[Panel]:
    if result.get("training"):
        yield Panel(3.2, lambda part: plot_training(part, result["training"]))


SUITE = Suite("training", training_table, panels=_panels)
