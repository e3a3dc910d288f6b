"""A study's page: ``report.md``, ``result.json`` and pictures, made of its tables alone.

``python -m experiments report FOLDER`` takes a folder of runs, whose tables it writes to the results
first, or one of results, whose page it makes again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import analysis as analysis_module
from experiments import choice, statistics
from experiments.analysis import UNITS, Analysis, Group, Line, analyse, times_to
from experiments.figures import draw_scores, draw_times, draw_tuning
from experiments.records import ENVIRONMENTS, RUNS, Record, read, write_tables
from experiments.statistics import ALPHA, Comparison

RESULTS = Path(__file__).resolve().parent / "results"
REPORT, RESULT = "report.md", "result.json"
Interval = tuple[float, float] | None


def make(folder: Path, results: Path = RESULTS) -> str:
    """Writes the page of a folder of runs, or of results, and returns what to print.

    Args:
        folder: of one study.
        results: where the folder of results goes, under the study's name.
    """
    if not (folder / RUNS).is_file():
        study, records = read(folder)
        folder = results / study.name
        write_tables(folder, study, records)
    study, records = read(folder)
    found = analyse(study, records, folder)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = {group: _pictures(found, group, folder) for group in study.groups}
    (folder / RESULT).write_text(json.dumps(_numbers(found), indent=1) + "\n")
    (folder / REPORT).write_text(_page(found, folder, pictures))
    tables = [_final_table(found, group) for group in found.groups if group.lines]
    sentences = [sentence.replace("**", "") for sentence in verdicts(found)]
    return "\n".join([*tables, *sentences, f"Page: {folder / REPORT}"])


def _pictures(found: Analysis, name: str, folder: Path) -> list[tuple[str, str]]:
    """(caption, file) of each picture that there are data for."""
    suffix = f"-{name}" if name else ""
    pictures = []
    for group in found.groups:
        if group.name == name and group.lines:
            draw_scores(found, group, folder / f"score{suffix}.png")
            caption = "Test score: medians and ranges over seeds; dotted: the target"
            pictures.append((caption, f"score{suffix}.png"))
            if group.target is not None:
                draw_times(found, group, folder / f"times{suffix}.png")
                caption = "Seconds to the target: every seed, and the median (bar)"
                pictures.append((caption, f"times{suffix}.png"))
    if draw_tuning(found, name, folder / f"tuning{suffix}.png"):
        caption = "Every trial: last validation score by what was drawn; ringed: chosen; x: lost"
        pictures.append((caption, f"tuning{suffix}.png"))
    return pictures


# --- tables and words -----------------------------------------------------------------------------------------


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned table that reads as plain text and renders as markdown."""
    widths = [max(len(line[i]) for line in [headers, *lines]) for i in range(len(headers))]

    def render(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([render(headers), rule, *map(render, lines)])


def _g(value: float, digits: int = 4) -> str:
    if math.isinf(value):
        return "never" if value > 0 else "none"
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _with_interval(value: float, interval: Interval, digits: int = 4) -> str:
    text = _g(value, digits)
    if interval is None:
        return text
    low, high = (_g(end, digits) for end in interval)
    return f"{text} [{low}, {high}]"


def _ratio(found: Comparison | None) -> str:
    if found is None:
        return ""
    return _with_interval(found.value, found.interval, 3).replace("never", "inf")


def _p(found: Comparison | None) -> str:
    return "" if found is None else f"{found.p:.2g}"


def verdicts(found: Analysis) -> list[str]:
    """A sentence for each method and unit, by fixed rules; gains, ties and losses read alike."""
    sentences = []
    if found.missing:
        sentences.append(f"**Not over:** {found.missing} runs are still to be made.")
    for group in found.groups:
        where = f"{group.name}: " if group.name else ""
        if group.baseline is None or group.target is None:
            sentences.append(f"{where}no target: no baseline came through with half of its seeds.")
            continue
        line = group.lines[group.baseline]
        sentences.append(
            f"{where}target {_g(group.target)}, reached by half of the seeds of the best baseline, "
            f"{group.baseline}, in {_g(line.time('seconds')[0], 3)} s (median)."
        )
        for other in group.lines.values():
            if other is not line:
                sentences.append(where + _verdict(other, line))
    return sentences


def _verdict(line: Line, baseline: Line) -> str:
    parts = []
    for unit in ("seconds", "epochs"):
        comparison = line.against_baseline.get(unit)
        if comparison is not None:
            times = [_g(other.time(unit)[0], 3) for other in (line, baseline)]
            parts.append(
                f"**{comparison.verdict} in {unit}** (median {times[0]} against {times[1]}, ratio "
                f"{_ratio(comparison)}, p = {_p(comparison)}, earlier with {comparison.better} and "
                f"later with {comparison.worse} of {comparison.seeds} seeds)"
            )
    comparison = line.against_baseline.get("score")
    if comparison is None:
        return f"{line.method}: no seed in common with {baseline.method}."
    parts.append(
        f"**{comparison.verdict} in final score** (median {_g(line.score()[0])} against "
        f"{_g(baseline.score()[0])}, p = {_p(comparison)})"
    )
    return f"{line.method} against {baseline.method}: {'; '.join(parts)}."


def _page(found: Analysis, folder: Path, pictures: dict[str, list[tuple[str, str]]]) -> str:
    study = found.study
    parts = [f"# {study.title or study.name}", study.question.strip()]
    parts.append("\n".join(f"- {sentence}" for sentence in verdicts(found)))
    for name in study.groups:
        group = next((g for g in found.groups if g.name == name), None)
        if name:
            parts.append(f"## {name}")
        if group is not None and group.lines:
            parts.append(_final_table(found, group))
            controls = _control_table(group)
            if controls:
                parts += ["Controls, against the method whose settings they have:", controls]
        parts += [f"{caption}:\n\n![{caption}]({file})" for caption, file in pictures[name]]
    parts += ["## Settings", _budget(found)]
    if found.winners:
        parts.append(_settings_table(found))
    parts += ["## How this was decided", _rules(), "## Where and how", _provenance(found, folder)]
    parts += ["## Every run", _run_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _final_table(found: Analysis, group: Group) -> str:
    headers = ["method", "final test score", "reached", "seconds to target", "epochs", "TFLOP"]
    headers += ["peak MB", "seconds / best baseline's", "p", "verdict in seconds"]
    lines = []
    for line in group.lines.values():
        seconds = line.against_baseline.get("seconds")
        kind = "control" if found.study.methods[line.method].settings_of else ""
        if line.method == group.baseline:
            kind = "best baseline"
        lines.append(
            [
                f"{line.method} ({kind})" if kind else line.method,
                _with_interval(*line.score()),
                f"{line.reached}/{len(line.records)}",
                *(_with_interval(*line.time(u), 3) for u in ("seconds", "epochs")),
                _with_interval(*line.time("TFLOP"), 3) if "TFLOP" in line.times else "",
                _g(line.fact("peak_memory_bytes") / 1e6, 4),
                _ratio(seconds),
                _p(seconds),
                "" if seconds is None else seconds.verdict,
            ]
        )
    return markdown_table(headers, lines)


def _control_table(group: Group) -> str:
    headers = ["control", "settings of", "seconds / its", "p", "epochs / its", "p"]
    headers += ["final score - its", "p", "verdicts (seconds, epochs, score)"]
    lines = []
    for line in group.lines.values():
        found = line.against_parent
        if found:
            score = found["score"]
            lines.append(
                [
                    line.method,
                    line.winner.method,
                    *(f(found.get(u)) for u in ("seconds", "epochs") for f in (_ratio, _p)),
                    _with_interval(score.value, score.interval, 2),
                    _p(score),
                    ", ".join(found[u].verdict for u in ("seconds", "epochs", "score")),
                ]
            )
    return markdown_table(headers, lines) if lines else ""


def _budget(found: Analysis) -> str:
    study = found.study
    if study.winners_from:
        return f"The settings are those that the study {study.winners_from} has chosen; nothing was tuned here."
    tuned = [method.name for method in study.methods.values() if method.space]
    if not tuned:
        return "All settings are fixed; nothing was tuned."
    text = (
        f"{study.trials} quasi-random trials of each method with a space of its own "
        f"({', '.join(tuned)}), {len(study.tuning_seeds)} seed(s) each, chosen by `{study.select}` on "
        "validation images. Controls have no trials: their settings are another method's."
    )
    spaces = [
        [method.name, dimension.key, dimension.kind, ", ".join(map(str, dimension.values))]
        for method in study.methods.values()
        for dimension in method.space
    ]
    return text + "\n\n" + markdown_table(["method", "setting", "drawn", "from"], spaces)


def _settings_table(found: Analysis) -> str:
    keys = list(dict.fromkeys(k for w in found.winners.values() for k in w.settings))
    if not keys:
        return ""
    lines = []
    for (group, method), winner in found.winners.items():
        spaces = {d.key: d for d in found.study.methods[winner.method].space}
        edges = {k for k, v in winner.settings.items() if k in spaces and spaces[k].at_edge(v)}
        settings = [f"{winner.settings.get(key, '')}{' *' * (key in edges)}" for key in keys]
        of = winner.method if winner.method != method else ""
        trial = "" if winner.trial is None else str(winner.trial)
        lines.append([group, method, of, trial, *settings])
    table = markdown_table(["group", "chosen for", "settings of", "trial", *keys], lines)
    marked = any(cell.endswith(" *") for line in lines for cell in line)
    return table + "\n\n\\*: in the outer tenth of its range." * marked


def _rules() -> str:
    """The lists at the heads of the modules that decide."""
    texts = [module.__doc__ or "" for module in (choice, analysis_module, statistics)]
    lists = "\n".join(text[text.index("* ") :].strip() for text in texts).replace("``", "`")
    return (
        f"{lists}\n* A gain or a loss needs p < {ALPHA:g} and an interval that leaves out 1 (scores: 0); "
        "all else is a tie, or undecided where the seeds are too few for such a p. p is not "
        "corrected for the number of comparisons on this page.\n* Seconds are those of training "
        "steps; evaluation, checkpoints and the first calls of a process are left out."
    )


def _provenance(found: Analysis, folder: Path) -> str:
    study, records = found.study, list(found.records.values())
    hours = sum(r.facts.get("cpu_seconds", 0) for r in records) / 3600
    wall = sum(r.facts.get("wall_seconds", 0) for r in records) / 3600
    load = [r.facts["load"] for r in records if "load" in r.facts]
    lines = [
        f"- Made by `python -m experiments queue {study.name}`; this page alone, from the tables "
        f"beside it: `python -m experiments report {_shown(folder)}`.",
        f"- {len(records)} runs took {hours:.2f} hours of CPU time, {wall:.2f} hours by the clock, with "
        "evaluation, starts and repeated attempts.",
    ]
    if load:
        lines.append(
            f"- The machine's load as the runs began: median {statistics.median(load):.2g}, at most "
            f"{max(load):.2g}."
        )
    if found.superseded:
        lines.append(
            f"- {len(found.superseded)} runs were made for an earlier form of this study; they are in "
            "the table, and in nothing else."
        )
    for environment in json.loads((folder / ENVIRONMENTS).read_text()):
        count = environment.pop("runs")
        versions = environment.pop("versions", {})
        texts = [f"{key} {value}" for key, value in versions.items()]
        texts += [f"{key.replace('_', ' ')}: {value}" for key, value in environment.items()]
        lines.append(f"- {count} runs: {', '.join(texts)}.")
    lines.append(
        "- Files: `study.yaml` (the declaration), `runs.csv`, `epochs.csv`, `result.json`."
    )
    return "\n".join(lines)


def _shown(folder: Path) -> str:
    """From the clone's root, where it lies within: pages name nobody's machine."""
    resolved = folder.resolve()
    root = RESULTS.parents[1]
    return str(resolved.relative_to(root) if resolved.is_relative_to(root) else folder.name)


def _run_table(found: Analysis) -> str:
    headers = ["phase", "group", "method", "trial", "seed", "status", "settings", "evaluations"]
    headers += ["last validation score", "last test score", "seconds to target", "seconds", "CPU s"]
    targets = {group.name: group.target for group in found.groups}
    superseded = set(found.superseded)
    lines = []
    for record in sorted(found.records.values(), key=_order):
        identity = record.identity
        last: dict[str, float] = record.rows[-1] if record.rows else {}
        target = targets.get(identity["group"])
        time = "" if target is None else _g(times_to(record, target)["seconds"], 4)
        lines.append(
            [
                identity["phase"] + (" (superseded)" if record.id in superseded else ""),
                identity["group"],
                identity["method"],
                "" if identity["trial"] is None else str(identity["trial"]),
                str(identity["seed"]),
                record.status + (f": {record.error}" if record.error else ""),
                ", ".join(f"{key} {value}" for key, value in record.settings.items()),
                str(len(record.rows)),
                *(_g(last.get(f"{split}_score", math.nan)) for split in ("validation", "test")),
                time if identity["phase"] == "final" else "",
                _g(last.get("seconds", math.nan)),
                _g(record.facts.get("cpu_seconds", math.nan)),
            ]
        )
    return markdown_table(headers, [[cell.replace("|", "/") for cell in line] for line in lines])


def _order(record: Record) -> tuple[Any, ...]:
    identity = record.identity
    trial = -1 if identity["trial"] is None else identity["trial"]
    phase = identity["phase"] != "final"
    return phase, identity["group"], identity["method"], trial, identity["seed"]


# --- numbers ---------------------------------------------------------------------------------------


def _json(value: Any) -> Any:
    """JSON has no infinity: what is never reached, or has no value, is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return value


def _numbers(found: Analysis) -> dict[str, Any]:
    """Everything that the page says in numbers."""
    groups = {group.name or "all": _group_numbers(group) for group in found.groups}
    cpu = sum(record.facts.get("cpu_seconds", 0) for record in found.records.values())
    document = {"study": found.study.name, "runs": len(found.records), "missing": found.missing}
    document |= {"superseded": found.superseded, "cpu_seconds": round(cpu, 1), "groups": groups}
    numbers: dict[str, Any] = _json(document)
    return numbers


def _group_numbers(group: Group) -> dict[str, Any]:
    return {
        "target": group.target,
        "baseline": group.baseline,
        "methods": {
            line.method: {
                "settings": line.winner.settings,
                "settings_of": line.winner.method,
                "trial": line.winner.trial,
                "reached": line.reached,
                "final_score": _median_numbers(line.scores, line.score()),
                "to_target": {
                    unit: _median_numbers(line.times[unit], line.time(unit))
                    for unit in UNITS
                    if unit in line.times
                },
                "against_baseline": {k: asdict(v) for k, v in line.against_baseline.items()},
                "against_parent": {k: asdict(v) for k, v in line.against_parent.items()},
            }
            for line in group.lines.values()
        },
    }


def _median_numbers(by_seed: dict[int, float], middle: tuple[float, Interval]) -> dict[str, Any]:
    return {"median": middle[0], "interval": middle[1], "by_seed": by_seed}
