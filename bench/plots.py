"""Plots of a result: a figure with a panel for each thing measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench import bars
from bench.budget import plot_budget
from bench.steps import LAYERS
from bench.training_report import plot_training


def plot(result: dict, path: Path) -> bool:
    """Draws speed-ups and roofline of the kernels, ratios of networks, scaling, training; bars marked.

    Returns False, and draws nothing, where the result has none of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if result.get("budget"):
        plot_budget(result["budget"], path)
        return True
    panels = _panels(result)
    if not panels:
        return False
    heights = [height for height, _ in panels]
    figure = plt.figure(figsize=(8.5, sum(heights) + 0.3), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (_, draw) in zip(parts, panels, strict=True):
        draw(part)
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"{device}, {result['settings']['dtype']}, {(machine['commit'] or '')[:10]}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _panels(result: dict) -> list[tuple[float, Callable]]:
    """(height in inches, what draws it into a subfigure) of everything there is to show."""
    from bench import kernel_plots

    panels: list[tuple[float, Callable]] = []
    kernels = [r for r in result.get("kernels", ()) if bars.speedup(r, "unfold")]
    if kernels:
        draw = lambda part: kernel_plots.plot_speedups(part.subplots(), kernels)  # noqa: E731
        panels.append((len(kernels) * 0.3 + 1.2, draw))
    rated = [r for r in kernels if r.get("useful_gflop") and r.get("useful_bytes")]
    if rated and "peaks" in result:
        draw = lambda part: kernel_plots.plot_roofline(  # noqa: E731
            part.subplots(), rated, result["peaks"]
        )
        panels.append((4.2, draw))
    for suite, (label, ratio, variants) in _RATIOS.items():
        rows = [
            (record["name"], {v: ratio(record, v) for v in variants if ratio(record, v)})
            for record in result.get(suite, ())
        ]
        rows = [(name, values) for name, values in rows if values]
        if rows:
            draw = lambda part, a=(suite, label, rows): _plot_ratios(part.subplots(), *a)  # noqa: E731
            panels.append((len(rows) * 0.7 + 1.2, draw))
    scaling = [r for r in result.get("scaling", ()) if "seconds" in r["methods"][bars.OURS]]
    if scaling:
        sweeps = len({record["sweep"] for record in scaling})
        draw = lambda part: kernel_plots.plot_scaling(part, scaling)  # noqa: E731
        panels.append((3 * ((sweeps + 1) // 2) + 0.4, draw))
    if result.get("training"):
        panels.append((3.2, lambda part: plot_training(part, result["training"])))
    return panels


def _peak_ratio(record: dict, variant: str) -> float | None:
    """The variant's peak memory over plain backpropagation's."""
    peaks = [record["methods"].get(name, {}).get("peak_bytes") for name in (variant, "bp")]
    return None if None in peaks else peaks[0] / peaks[1]


def _slowdown(record: dict, variant: str) -> float | None:
    """The variant's time over plain backpropagation's."""
    return bars.speedup(record, variant, "bp")


# {suite: (label of the axis, figure of (record, variant), variants)}
_RATIOS: dict[str, tuple[str, Callable[[dict, str], float | None], tuple[str, ...]]] = {
    "update": ("time of the published update over ours", bars.speedup, ("published",)),
    "step": (
        "time of a step over plain backpropagation's",
        _slowdown,
        ("dbp", LAYERS, "published"),
    ),
    "accumulation": (
        "time of a step of several micro-steps over plain backpropagation's",
        _slowdown,
        ("dbp", LAYERS),
    ),
    "memory": (
        "peak memory over plain backpropagation's",
        _peak_ratio,
        ("dbp", LAYERS, "published"),
    ),
}


def _plot_ratios(axes, suite: str, label: str, rows: Sequence[tuple[str, dict]]) -> None:
    from matplotlib.patches import Patch

    from bench.kernel_plots import COLOURS, LEGEND_ABOVE

    seen = list(dict.fromkeys(variant for _, values in rows for variant in values))
    for row, (name, values) in enumerate(rows):
        for place, variant in enumerate(seen):
            if variant in values:
                y = row + 0.8 * ((place + 0.5) / len(seen) - 0.5)
                axes.barh(y, values[variant], 0.76 / len(seen), color=COLOURS[variant])
                axes.text(values[variant], y, f" {values[variant]:.2f}", va="center", fontsize=8)
        for bar in bars.BARS:
            if (bar.suite, bar.case, bar.metric) == (suite, name, "slowdown"):
                for limit, style in ((bar.bar, "k-"), (bar.goal, "k:")):
                    if limit is not None:
                        axes.plot([limit] * 2, [row - 0.45, row + 0.05], style, linewidth=1.6)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(handles=[Patch(color=COLOURS[v], label=v) for v in seen], **LEGEND_ABOVE)
