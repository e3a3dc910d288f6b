"""The page about Fisher matrices, from what ``experiments.fisher`` has found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.figures import COLOURS, plain, pyplot, save
from experiments.fisher_matrix import FORMS, KINDS, Row

MEASURED = ("condition", "directions", "cosine", "loss", "accuracy")


def medians(rows: list[Row], form: str, kind: str, value: str) -> dict[int, float]:
    """{step: median over the seeds}."""
    of_step: dict[int, list[float]] = {}
    for row in rows:
        if (row.form, row.kind) == (form, kind):
            of_step.setdefault(row.step, []).append(getattr(row, value))
    return {step: statistics.median(values) for step, values in of_step.items()}


def seeds_agreeing(
    rows: list[Row], kind: str, value: str, better: Callable[[float, float], bool]
) -> int:
    """In how many seeds DBP, in W, is better than BP at the end."""
    last = max(row.step for row in rows)
    found = {
        (row.seed, row.form): getattr(row, value)
        for row in rows
        if row.kind == kind and row.step == last
    }
    seeds = {seed for seed, _ in found}
    return sum(better(found[seed, "dbp"], found[seed, "bp"]) for seed in seeds)


def report(rows: list[Row], saved: Mapping[str, Any]) -> str:
    """As Markdown; ``saved``: what is in ``spectra.json``."""
    settings = saved["settings"]
    lines = [
        "# Conditioning of the Fisher matrix, with and without DBP",
        "",
        f"Two convolutions and a linear layer, {saved['parameters']} parameters, on scikit-learn's digits; SGD at lr "
        f"{settings['lr']:g}, batches of {settings['batch_size']}; DBP at lr {settings['decor_lr']:g}, kappa "
        f"{settings['kappa']:g}, sample {settings['sample']:g}; seeds {', '.join(map(str, settings['seeds']))}. "
        "Medians over the seeds. The condition number and the natural gradient are damped by "
        f"{saved['damping']:g} of the mean eigenvalue. Directions: (sum of eigenvalues)^2 / sum of their squares. "
        "Cosine: between the gradient and the natural gradient. Made by "
        "`python -m experiments fisher`; every matrix is a line of fisher.csv.",
        "",
        f"It took {saved['cpu_seconds'] / 3600:.2f} hours of CPU time; spectra.json has versions, machine "
        "and commit.",
        "",
    ]
    seeds = len(settings["seeds"])
    for kind, name in KINDS.items():
        lines += [
            f"## {name[0].upper()}{name[1:]}",
            "",
            "| step | form | condition | directions | cosine | loss | accuracy |",
            "|---|---|---|---|---|---|---|",
        ]
        for step in sorted({row.step for row in rows}):
            for form, label in FORMS.items():
                of = {v: medians(rows, form, kind, v)[step] for v in MEASURED}
                lines.append(
                    f"| {step} | {label} | {of['condition']:.3g} | {of['directions']:.3g} | "
                    f"{of['cosine']:.3f} | {of['loss']:.3g} | {of['accuracy']:.1%} |"
                )
        lower = seeds_agreeing(rows, kind, "condition", lambda dbp, bp: dbp < bp)
        nearer = seeds_agreeing(rows, kind, "cosine", lambda dbp, bp: dbp > bp)
        lines += [
            "",
            f"At the end DBP's condition number is the lower in {lower} of {seeds} seeds, and its "
            f"gradient is nearer to the natural one in {nearer} of {seeds}.",
            "",
        ]
    return "\n".join([*lines, "![Condition, directions, cosine and spectra](fisher.png)", ""])


def draw(rows: list[Row], spectra: dict[str, list[float]], path: Path) -> None:
    """Above: condition and cosine against steps; below: loss, and the spectra of the first seed."""
    plt = pyplot()
    colours = {form: COLOURS[i] for form, i in zip(FORMS, (1, 0, 5))}
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = {(0, 0): "condition", (0, 1): "cosine", (1, 0): "loss"}
    for place, value in panels.items():
        axis = axes[place]
        for form, label in FORMS.items():
            kinds = ["model"] if value == "loss" else list(KINDS)
            for kind in kinds:
                of_step = medians(rows, form, kind, value)
                axis.plot(
                    [max(step, 1) for step in of_step],
                    list(of_step.values()),
                    color=colours[form],
                    linestyle="-" if kind == "model" else ":",
                    label=f"{label}" + (", empirical" if kind == "empirical" else ""),
                )
        axis.set(xscale="log", xlabel="step (0 at 1)", ylabel=value)
        if value != "cosine":
            axis.set_yscale("log")
    axes[0, 0].set_ylabel("condition number, damped")
    axes[0, 1].set_ylabel("cosine of gradient and natural gradient")
    axes[1, 0].set_ylabel("training loss")
    for form, label in FORMS.items():
        values = [v for v in spectra[f"{form}, model"] if v > 0]
        largest = values[0]
        axes[1, 1].plot([v / largest for v in values], color=colours[form], label=label)
    axes[1, 1].set(
        yscale="log",
        ylim=(1e-10, 2),
        xlabel="eigenvalue of the model's Fisher matrix, at the end",
        ylabel="over the largest",
    )
    for axis in axes.flat:
        plain(axis)
    axes[0, 0].legend(fontsize=8, edgecolor="none", framealpha=0.85)
    axes[1, 1].legend(fontsize=8, edgecolor="none", framealpha=0.85)
    save(plt, figure, path)
