"""Everything that a result (the dictionary that a result file holds) says, as text and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.core import bars, plots
from bench.core.table import format_table
from bench.suites import SUITES
from bench.suites.budget import plot_budget


def text_report(result: dict) -> str:
    """Settings, tables, means, bars."""
    parts = [_header(result)]
    for name, suite in SUITES.items():
        if result.get(name):
            parts += [suite.heading, suite.table(result[name])]
    parts += [problems(judged_records(result))]
    parts += ["bars", bars_table(bars.evaluate(result))]
    return "\n\n".join(part for part in parts if part)


def judged_records(result: dict) -> Iterator[dict]:
    """The case records of every suite that compares methods."""
    for suite in SUITES:
        yield from (record for record in result.get(suite, ()) if "methods" in record)


def _header(result: dict) -> str:
    machine, settings = result["machine"], result["settings"]
    commit = (machine["commit"] or "no commit")[:10] + (" + changes" if machine["dirty"] else "")
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"$ {result['command']}",
        f"{device}; torch {machine['torch']}; {settings['dtype']}; {commit}",
    ]
    peaks = result.get("peaks")
    if peaks:
        lines.append(
            f"measured here: {peaks['gemm_tflops']:.3g} TFLOP/s in a large matrix product, "
            f"{peaks['copy_gbytes']:.3g} GB/s read and written in a large copy"
        )
    if not result.get("complete", True):
        lines.append("INCOMPLETE: the run was interrupted")
    return "\n".join(lines)


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
        many = verdict.bar.case == "*" or verdict.bar.metric == "well predicted"
        where = verdict.where if many else ""
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


def plot(result: dict, path: Path) -> bool:
    """Draws what each suite has to show, bars marked; budgets, where there are any, by themselves.

    Returns False, and draws nothing, where the result has none of it.
    """
    if result.get("budget"):
        plot_budget(result["budget"], path)
        return True
    panels = [panel for suite in SUITES.values() for panel in suite.panels(result)]
    if not panels:
        return False
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    commit = (machine["commit"] or "")[:10]
    plots.draw(panels, f"{device}, {result['settings']['dtype']}, {commit}", path)
    return True
