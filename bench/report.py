"""Tables and a plot from a result (the dictionary that a result file holds)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import bars

_RIVALS = ("unfold", "self_wgrad")
_GPU_RIVALS = ("padded_gemm",)


def text_report(result: dict) -> str:
    """Everything a result says, as text: settings, tables, means, bars."""
    parts = [_header(result)]
    if result.get("kernels"):
        parts += ["patch_gram", kernel_table(result["kernels"]), means_text(result["kernels"])]
    if result.get("step"):
        parts += ["whole training steps", step_table(result["step"])]
    if result.get("budget"):
        from .budget import budget_table

        parts += ["budgets", budget_table(result["budget"])]
    parts += [problems(result["kernels"] + result["step"])]
    parts += ["bars", bars_table(bars.evaluate(result))]
    return "\n\n".join(part for part in parts if part)


def _header(result: dict) -> str:
    machine, settings = result["machine"], result["settings"]
    commit = (machine["commit"] or "no commit")[:10] + (" + changes" if machine["dirty"] else "")
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"$ {result['command']}",
        f"{device}; torch {machine['torch']}; {settings['dtype']}; {commit}",
    ]
    if not result.get("complete", True):
        lines.append("INCOMPLETE: the run was interrupted")
    return "\n".join(lines)


def kernel_table(records: Sequence[dict]) -> str:
    """One row a case: ours in milliseconds, then how many times as long each rival takes.

    In brackets the quartiles of our time. "memory" is the extra memory of one call over the bytes
    of the float32 input, ours and (unfold's).
    """
    rivals = _rivals(records)
    head = ["case", "n", "D", "ours ms [quartiles]", *(f"{r} x" for r in rivals)]
    rows = [[*head, "memory (unfold)", "algorithm"]]
    for record in records:
        row = [record["name"], str(record["n"]), str(record["D"])]
        row.append(_milliseconds(record["methods"].get(bars.OURS)))
        row += [_ratio(record, rival) for rival in rivals]
        memory = (_memory(record, name) for name in (bars.OURS, "unfold"))
        row.append("{} ({})".format(*memory))
        rows.append([*row, record.get("choice") or "-"])
    return format_table(rows)


def _rivals(records: Iterable[dict]) -> tuple[str, ...]:
    """The rivals of patch_gram; those of GPUs only where some case was measured with them."""
    measured = {name for record in records for name in record["methods"]}
    return (*_RIVALS, *(name for name in _GPU_RIVALS if name in measured))


def step_table(records: Sequence[dict]) -> str:
    """One row a network and variant: milliseconds a step and the ratio to plain backpropagation."""
    rows = [["network", "sample", "variant", "ms [quartiles]", "x bp", "pairs"]]
    for record in records:
        for name, method in record["methods"].items():
            slowdown = bars.speedup(record, name, "bp")
            rows.append(
                [
                    record["name"],
                    f"{record['sample']:g}",
                    name,
                    _milliseconds(method),
                    "-" if slowdown is None else f"{slowdown:.3f}",
                    str(method["seconds"]["samples"]) if "seconds" in method else "-",
                ]
            )
    return format_table(rows)


def geometric_means(records: Iterable[dict]) -> dict[str, tuple[float, int]]:
    """{what: (geometric mean of the speed-up, number of cases)}, over cases with both numbers.

    Per rival over all cases and over kernels of at least 3 with stride 1; and against the best
    rival of each case.
    """
    logs: dict[str, list[float]] = {}
    records = list(records)
    rivals = _rivals(records)
    for record in records:
        ratios = {rival: bars.speedup(record, rival) for rival in rivals}
        known = {rival: ratio for rival, ratio in ratios.items() if ratio}
        structured = bool(record["kernel"]) and min(record["kernel"]) >= 3
        structured = structured and set(record["stride"]) == {1}
        entries = dict(known)
        if known:
            entries["best rival"] = min(known.values())
        for name, ratio in entries.items():
            logs.setdefault(f"{name}, all cases", []).append(math.log(ratio))
            if structured:
                logs.setdefault(f"{name}, K >= 3 stride 1", []).append(math.log(ratio))
    return {
        name: (math.exp(sum(values) / len(values)), len(values)) for name, values in logs.items()
    }


def means_text(records: Iterable[dict]) -> str:
    """The geometric means as a table."""
    rows = [["geometric mean speed-up over", "x", "cases"]]
    rows += [
        [n, f"{mean:.2f}", str(count)] for n, (mean, count) in geometric_means(records).items()
    ]
    return format_table(rows)


def bars_table(verdicts: Iterable[bars.Verdict]) -> str:
    """One row a bar: the figure, met or missed, and the goal beyond it."""
    rows = [["bar", "figure", "", "goal", "note"]]
    for verdict in verdicts:
        goal = "-"
        if verdict.bar.goal is not None:
            goal = f"{verdict.bar.goal:g}"
            if verdict.goal_met is not None:
                goal += " met" if verdict.goal_met else " not met"
        figure = "-" if verdict.figure is None else f"{verdict.figure:.3g}"
        where = verdict.where if verdict.bar.case == "*" else ""
        note = ": ".join(filter(None, (where, verdict.why)))
        rows.append([verdict.bar.text, figure, verdict.status.upper(), goal, note])
    return format_table(rows)


def problems(records: Iterable[dict]) -> str:
    """One line for every method that was wrong or failed."""
    return "\n".join(
        f"{record['name']}: {name} {method['status']}: {method['reason']}"
        for record in records
        for name, method in record["methods"].items()
        if method["status"] in ("wrong", "failed")
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _milliseconds(method: dict | None) -> str:
    if method is None or "seconds" not in method:
        return (method or {"status": "-"})["status"]
    seconds = method["seconds"]
    median, q1, q3 = (_short(seconds[key] * 1e3) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}-{q3}]"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(record: dict, rival: str) -> str:
    ratio = bars.speedup(record, rival)
    if ratio is not None:
        return f"{ratio:.2f}"
    status = record["methods"].get(rival, {"status": "-"})["status"]
    return "-" if status == "ok" else status


def _memory(record: dict, name: str) -> str:
    extra = record["methods"].get(name, {}).get("extra_bytes")
    return "-" if extra is None else f"{extra / (4 * record['input_elements']):.2f}"


def plot(result: dict, path: Path) -> bool:
    """Draws the speed-up of every kernel case, and the steps' ratios, with the bars marked.

    Returns False, and draws nothing, where the result has neither.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if result.get("budget"):
        from .budget import plot_budget

        plot_budget(result["budget"], path)
        return True
    kernels = [r for r in result.get("kernels", ()) if bars.speedup(r, "unfold")]
    steps = [r for r in result.get("step", ()) if bars.speedup(r, "bp")]
    heights = [len(kernels) * 0.3 + 1.2 if kernels else 0, len(steps) * 0.7 + 1.2 if steps else 0]
    shown = [height for height in heights if height]
    if not shown:
        return False
    figure, axes = plt.subplots(
        len(shown),
        1,
        figsize=(8.5, sum(shown)),
        height_ratios=shown,
        squeeze=False,
        layout="constrained",
    )
    panels = iter(axes[:, 0])
    if kernels:
        _plot_kernels(next(panels), kernels)
    if steps:
        _plot_steps(next(panels), steps)
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"{device}, {result['settings']['dtype']}, {(machine['commit'] or '')[:10]}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


_LEGEND_ABOVE = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 4,
    "fontsize": 8,
    "frameon": False,
}
_COLOURS = {"unfold": "#4477aa", "self_wgrad": "#ccbb44", "dbp": "#4477aa", "published": "#ee6677"}


def _plot_kernels(axes, records: Sequence[dict]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for row, record in enumerate(records):
        for offset, rival in zip((-0.2, 0.2), _RIVALS, strict=True):
            ratio = bars.speedup(record, rival)
            if ratio:
                axes.barh(row + offset, ratio, 0.38, color=_COLOURS[rival])
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
            Patch(color=_COLOURS["unfold"], label="unfold + matmul"),
            Patch(color=_COLOURS["self_wgrad"], label="self weight gradient + borders"),
            Line2D([], [], color="k", label="bar (against unfold)"),
            Line2D([], [], color="k", linestyle=":", label="goal"),
        ],
        **_LEGEND_ABOVE,
    )


def _plot_steps(axes, records: Sequence[dict]) -> None:
    from matplotlib.patches import Patch

    variants = ("dbp", "published")
    for row, record in enumerate(records):
        for offset, variant in zip((-0.2, 0.2), variants, strict=True):
            slowdown = bars.speedup(record, variant, "bp")
            if slowdown:
                axes.barh(row + offset, slowdown, 0.38, color=_COLOURS[variant])
                axes.text(slowdown, row + offset, f" {slowdown:.2f}", va="center", fontsize=8)
        for bar in bars.BARS:
            if bar.suite == "step" and bar.case == record["name"]:
                axes.plot([bar.bar] * 2, [row - 0.45, row + 0.05], "k-", linewidth=1.6)
                if bar.goal is not None:
                    axes.plot([bar.goal] * 2, [row - 0.45, row + 0.05], "k:", linewidth=1.6)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(records)), [record["name"] for record in records], fontsize=8)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlabel("time of a step over plain backpropagation's")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(
        handles=[Patch(color=_COLOURS[v], label=v) for v in variants],
        **_LEGEND_ABOVE,
    )
