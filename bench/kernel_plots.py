"""Panels of patch_gram on layers: speed-ups, roofline, scaling."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench import bars
from bench.kernel_tables import rivals_of

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


def plot_speedups(axes: Axes, records: Sequence[dict]) -> None:
    for row, record in enumerate(records):
        for offset, rival in zip((-0.2, 0.2), ("unfold", "self_wgrad"), strict=True):
            ratio = bars.speedup(record, rival)
            if ratio:
                axes.barh(row + offset, ratio, 0.38, color=COLOURS[rival])
        for bar in bars.thresholds(record["name"], "unfold"):
            for limit, style in ((bar.bar, "-"), (bar.goal, ":")):
                if limit is not None:
                    axes.plot([limit, limit], [row - 0.45, row + 0.05], "k" + style, linewidth=1.6)
    for bar in bars.thresholds("*", "unfold"):
        axes.axvline(bar.bar, color="black", linewidth=0.8)
    axes.set_yticks(range(len(records)), [record["name"] for record in records], fontsize=8)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time of the rival over time of patch_gram")
    axes.legend(
        handles=[
            Patch(color=COLOURS["unfold"], label="unfold + matmul"),
            Patch(color=COLOURS["self_wgrad"], label="self weight gradient + borders"),
            Line2D([], [], color="k", label="bar (against unfold)"),
            Line2D([], [], color="k", linestyle=":", label="goal"),
        ],
        **LEGEND_ABOVE,
    )


def plot_roofline(axes: Axes, records: Sequence[dict], peaks: dict) -> None:
    """Useful operations per second against useful operations per byte, under the measured roofs.

    Useful are the operations and bytes that no way to S can avoid, whatever a method did.
    """
    intensity = [r["useful_gflop"] * 1e9 / r["useful_bytes"] for r in records]
    peak, copy = peaks["gemm_tflops"], peaks["copy_gbytes"] / 1e3
    left, right = min(intensity) / 2, max(max(intensity), peak / copy) * 2
    axes.plot([left, peak / copy, right], [left * copy, peak, peak], "k-", linewidth=1.2)
    axes.annotate("large matrix product", (right, peak), ha="right", va="bottom", fontsize=8)
    axes.annotate("large copy", (left, left * copy), va="bottom", fontsize=8)
    for name in (*rivals_of(records), bars.OURS):  # ours on top
        points = [
            (x, record["methods"][name]["useful_tflops"])
            for x, record in zip(intensity, records, strict=True)
            if "useful_tflops" in record["methods"].get(name, {})
        ]
        axes.scatter(
            *zip(*points, strict=True) if points else ((), ()),
            s=22 if name == bars.OURS else 12,
            color="#000000" if name == bars.OURS else COLOURS.get(name, OTHER),
            label="patch_gram" if name == bars.OURS else name,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("useful operations per useful byte")
    axes.set_ylabel("useful TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(**LEGEND_ABOVE)


def plot_scaling(figure: SubFigure, records: Sequence[dict]) -> None:
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
