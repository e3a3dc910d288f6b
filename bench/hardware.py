"""The README's table of GPUs: what device checks found on them, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import bars
from bench.device.stage import SKIPPED
from bench.table import format_table
from dbp_kernels.verify.workers import NOT_RUN, PASSED

BEGIN, END = "<!-- hardware:begin -->", "<!-- hardware:end -->"
NOTHING = "No device check has run on a GPU yet."


def ran_on_gpu(result: dict) -> bool:
    """Whether it is a device check's result, not of a rehearsal."""
    settings = result.get("settings", {})
    on_gpu = settings.get("device") == "cuda" and "gpu" in result.get("machine", {})
    return "checks" in result and on_gpu and not settings.get("rehearsal")


def committed(folder: Path) -> dict[str, dict]:
    """{file name: result} of all device checks in a folder, oldest first."""
    results = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = [(name, result) for name, result in results.items() if ran_on_gpu(result)]
    return dict(sorted(found, key=lambda item: item[1]["started"]))


def cases(result: dict, stages: Sequence[str] = ()) -> Iterator[dict]:
    """The records of the cases of some stages, by default of all, but of those that did not apply."""
    for stage, check in result["checks"].items():
        if not stages or stage in stages:
            yield from (case for case in check["cases"] if case["status"] != SKIPPED)


def failed(case: dict) -> bool:
    return case["status"] not in (PASSED, NOT_RUN)


def table(results: dict[str, dict]) -> str:
    """One row a result; links are relative to the clone."""
    if not results:
        return NOTHING
    rows = [["GPU", "with", "result", "cases passed", "figures held to bars"]]
    rows += [[*_row(name, result)] for name, result in results.items()]
    return format_table(rows)


def _row(name: str, result: dict) -> Iterator[str]:
    machine, environment = result["machine"], result["environment"]
    yield f"{machine['gpu']}, sm_{machine['capability'].replace('.', '')}"
    triton = environment.get("triton")
    yield f"torch {machine['torch']}" + (f", Triton {triton}" if triton else "")
    commit = (machine["commit"] or "no commit")[:10] + (" + changes" if machine["dirty"] else "")
    yield f"[{commit}](bench/results/{name}), {result['started'][:10]}"
    yield _passed(result)
    held = [v for v in bars.evaluate(result) if v.figure is not None]
    yield "; ".join(f"{v.bar.text}: {v.figure:.3g} {v.status}" for v in held) or "none"


def _passed(result: dict) -> str:
    """How many of those that were run, and of which kinds those are that did not pass."""
    run = [case for case in cases(result) if case["status"] != NOT_RUN]
    text = f"{sum(case['status'] == PASSED for case in run)} of {len(run)}"
    wrong: dict[str, int] = {}
    for case in filter(failed, run):
        kind = " ".join(case["case"].split(":")[0].split()[:2])
        wrong[kind] = wrong.get(kind, 0) + 1
    names = ", ".join(f"{kind} ({n})" for kind, n in wrong.items())
    return f"{text}; **not** {names}" if names else text


def insert(text: str, table: str) -> str:
    """The text with a table between its markers. Raises ValueError if they are not there once."""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or any(mark in old + after for mark in (BEGIN, END)):
        raise ValueError(f"expected one {BEGIN} and, after it, one {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
