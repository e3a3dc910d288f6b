"""What the suites' plots share: colours, legends, panels of ratios, a picture of several panels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.core import bars
from bench.core.suite import Panel

LEGEND_ABOVE = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 4,
    "fontsize": 8,
    "frameon": False,
}
COLOURS = {
    "dbp": "#4477aa",
    "unfold": "#66ccee",
    "self_wgrad": "#ccbb44",
    "padded_gemm": "#228833",
    "published": "#ee6677",
    "dbp layers": "#aa3377",
}
OTHER = "#999999"


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draws the panels, one below the other, into a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [panel.height for panel in panels]
    figure = plt.figure(figsize=(8.5, sum(heights) + 0.3), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, panel in zip(parts, panels, strict=True):
        panel.draw(part)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def slowdown(record: dict, variant: str) -> float | None:
    """The variant's time over plain backpropagation's."""
    return bars.speedup(record, variant, "bp")


def ratio_panels(
    suite: str,
    label: str,
    ratio: Callable[[dict, str], float | None],
    variants: Sequence[str],
) -> Callable[[dict], Iterator[Panel]]:
    """The panels of a suite whose plot is one bar for each case and variant: ``ratio(record, variant)``."""

    def panels(result: dict) -> Iterator[Panel]:
        rows = [
            (record["name"], {v: ratio(record, v) for v in variants if ratio(record, v)})
            for record in result.get(suite, ())
        ]
        rows = [(name, values) for name, values in rows if values]
        if rows:
            height = len(rows) * 0.7 + 1.2
            yield Panel(height, lambda part: _plot_ratios(part.subplots(), suite, label, rows))

    return panels


def _plot_ratios(axes, suite: str, label: str, rows: Sequence[tuple[str, dict]]) -> None:
    from matplotlib.patches import Patch

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
