"""Everything that a result (the dictionary that a result file holds) says, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from bench import bars, host_time
from bench.budget import budget_table
from bench.kernel_tables import kernel_table, means_text, scaling_table
from bench.network_tables import memory_table, step_table, step_text, update_table
from bench.regret_tables import regret_table
from bench.table import format_table
from bench.training_report import training_table

# {suite: (heading, what makes its text from its records)}
_SUITES: dict[str, tuple[str, Callable[[Sequence[dict]], str]]] = {
    "kernels": ("patch_gram", lambda r: f"{kernel_table(r)}\n\n{means_text(r)}"),
    "update": ("one update of every layer", update_table),
    "step": ("whole training steps", step_text),
    "accumulation": ("training steps of several micro-steps", step_table),
    "memory": ("peak memory of training", memory_table),
    "scaling": ("patch_gram as one size grows", scaling_table),
    "regret": ("the planner's choices", regret_table),
    "budget": ("budgets", budget_table),
    "training": ("training", training_table),
    "host_time": ("Python's part of one call of patch_gram", host_time.table),
}


def text_report(result: dict) -> str:
    """Settings, tables, means, bars."""
    parts = [_header(result)]
    for suite, (heading, text) in _SUITES.items():
        if result.get(suite):
            parts += [heading, text(result[suite])]
    parts += [problems(judged_records(result))]
    parts += ["bars", bars_table(bars.evaluate(result))]
    return "\n\n".join(part for part in parts if part)


def judged_records(result: dict) -> Iterator[dict]:
    """The case records of every suite that compares methods."""
    for suite in _SUITES:
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
