"""What a study's runs have left: read from their folders, or from the tables made of them.

A folder of runs has ``study.yaml`` and a folder for each run: ``planned.json`` and
``attempts.jsonl`` by the queue, ``metrics.csv`` and ``result.json`` by the training program. A folder
of results has the same in small: ``study.yaml``, ``runs.csv``, ``epochs.csv``,
``environments.json``.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.checkpoint import write_atomically
from experiments.study import PlannedRun, Study, parse

STUDY, PLANNED, ATTEMPTS = "study.yaml", "planned.json", "attempts.jsonl"
RUNS, EPOCHS, ENVIRONMENTS = "runs.csv", "epochs.csv", "environments.json"
# Of runs that are over: what has another status is still to be done.
OVER = ("finished", "diverged", "failed")
IDENTITY = ("group", "method", "phase", "trial", "seed")
RESULT_FACTS = ("seconds", "flops_per_step", "energy_joules", "peak_memory_bytes")
FACTS = (*RESULT_FACTS, "cpu_seconds", "wall_seconds", "attempts", "load")
# Of ``result.json``: what is of this run alone. The rest is versions and machine.
OWN = {*RESULT_FACTS, "status", "epochs", "command"}


@dataclass(frozen=True)
class Record:
    """One run: what it was, how it ended, and its evaluations in order.

    Attributes:
        id: the name of its folder.
        identity: group, method, phase, trial and seed.
        settings: what was drawn for it (of a final run: what its method's winner had drawn).
        status: "finished", "diverged", "failed" (it raised or was killed) or "unfinished".
        rows: columns of ``metrics.csv``; an empty cell is NaN.
        facts: numbers about the whole run; what is not known is left out. ``load``: the machine's
            load average over a minute as the run began.
        environment: versions, machine and commit; empty when read from tables.
    """

    id: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    status: str
    rows: list[dict[str, float]]
    facts: dict[str, float] = field(default_factory=dict)
    error: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.status in OVER


def read(folder: Path) -> tuple[Study, dict[str, Record]]:
    """The study and its records by id. Raises FileNotFoundError for a folder of neither kind."""
    if not (folder / STUDY).is_file():
        raise FileNotFoundError(f"{folder} holds no study: {STUDY} is missing")
    study = parse((folder / STUDY).read_text(), str(folder / STUDY))
    if (folder / RUNS).is_file():
        return study, _from_tables(folder)
    runs = sorted(path.parent for path in folder.glob(f"*/{PLANNED}"))
    return study, {run.name: read_run(run) for run in runs}


def read_run(folder: Path) -> Record:
    """The record of one run's folder, which holds ``planned.json``."""
    planned = json.loads((folder / PLANNED).read_text())
    attempts = attempts_at(folder)
    facts: dict[str, float] = {"attempts": len(attempts)}
    for name in ("cpu_seconds", "wall_seconds"):
        facts[name] = sum(attempt.get(name, 0.0) for attempt in attempts)
    if attempts and attempts[-1].get("load") is not None:
        facts["load"] = attempts[-1]["load"]
    result_file = folder / "result.json"
    status, error, environment = "unfinished", "", {}
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        status = result["status"]
        facts |= {name: result[name] for name in RESULT_FACTS if result.get(name) is not None}
        environment = {key: value for key, value in result.items() if key not in OWN}
    elif attempts and attempts[-1].get("outcome") == "failed":
        status, error = "failed", attempts[-1].get("error", "")
    rows = _read_rows(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else []
    return Record(
        id=folder.name,
        identity={name: planned[name] for name in IDENTITY},
        settings=planned["settings"],
        status=status,
        rows=rows,
        facts=facts,
        error=error,
        environment=environment,
    )


def write_planned(folder: Path, planned: PlannedRun) -> None:
    """Before a run begins: what it is."""
    names = (*IDENTITY, "settings", "config")
    document = {"study": planned.study} | {name: getattr(planned, name) for name in names}
    write_atomically(folder / PLANNED, (json.dumps(document, indent=1) + "\n").encode())


def attempts_at(folder: Path) -> list[dict[str, Any]]:
    """Each attempt at the run; of one whose end was never written there is its beginning."""
    if not (folder / ATTEMPTS).is_file():
        return []
    attempts: list[dict[str, Any]] = []
    for line in (folder / ATTEMPTS).read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short, as the machine went down
            continue
        if "began" in entry:
            attempts.append(entry)
        elif attempts:
            attempts[-1] = {**attempts[-1], **entry}
    return attempts


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _read_rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: _number(c) for name, c in line.items()} for line in csv.DictReader(file)]


def write_tables(folder: Path, study: Study, records: Mapping[str, Record]) -> None:
    """Everything that a report is made of: every run, whatever became of it, and its evaluations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STUDY).write_text(study.text)
    keys = list(dict.fromkeys(key for record in records.values() for key in record.settings))
    header = ["id", *IDENTITY, "status", *FACTS, *(f"set:{key}" for key in keys), "error"]
    lines: list[list[Any]] = []
    epochs: list[list[Any]] = []
    columns = list(dict.fromkeys(c for r in records.values() for row in r.rows for c in row))
    for record in records.values():
        settings = [
            json.dumps(record.settings[key]) if key in record.settings else "" for key in keys
        ]
        lines.append(
            [
                record.id,
                *(record.identity[name] for name in IDENTITY),
                record.status,
                *(_short(record.facts.get(name)) for name in FACTS),
                *settings,
                record.error,
            ]
        )
        epochs += [[record.id, *(_short(row.get(c)) for c in columns)] for row in record.rows]
    _write_csv(folder / RUNS, header, lines)
    _write_csv(folder / EPOCHS, ["id", *columns], epochs)
    document = json.dumps(_environments(records.values()), indent=1)
    (folder / ENVIRONMENTS).write_text(document + "\n")


def _short(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.9g}"


def _write_csv(path: Path, header: list[str], lines: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def _environments(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Each environment once, with the number of runs that had it."""
    counted: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.environment:
            key = json.dumps(record.environment, sort_keys=True)
            entry = counted.setdefault(key, {"runs": 0, **record.environment})
            entry["runs"] += 1
    return list(counted.values())


def _from_tables(folder: Path) -> dict[str, Record]:
    rows: dict[str, list[dict[str, float]]] = {}
    with (folder / EPOCHS).open(newline="") as file:
        for line in csv.DictReader(file):
            run = line.pop("id")
            rows.setdefault(run, []).append({name: _number(cell) for name, cell in line.items()})
    records = {}
    with (folder / RUNS).open(newline="") as file:
        for line in csv.DictReader(file):
            identity: dict[str, Any] = {name: line[name] for name in ("group", "method", "phase")}
            identity["trial"] = int(line["trial"]) if line["trial"] else None
            identity["seed"] = int(line["seed"])
            settings = {
                key.removeprefix("set:"): json.loads(cell)
                for key, cell in line.items()
                if key.startswith("set:") and cell
            }
            facts = {name: float(line[name]) for name in FACTS if line[name]}
            run = line["id"]
            records[run] = Record(
                run, identity, settings, line["status"], rows.get(run, []), facts, line["error"]
            )
    return records
