"""Committed limits of every row: what a change may not make worse unnoticed.

Another compiler makes other code: of a backend whose compiler is another version than the limits' are
for, nothing is compared.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bench.counters.measure import key

FILE = Path(__file__).with_name("limits.json")
FIELDS = (
    "instructions_per_mma",
    "loop_instructions_per_mma",
    "loop_wavefronts",
    "sectors",
    "read_mb",
    "written_mb",
    "us",
)
_SLACK = 1.02  # counts do not vary; which blocks stand for the grid does, with its size


@cache
def compilers() -> dict[str, str]:
    """{backend: version of its compiler} of those that are here."""
    found = {}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        found["cuda"] = re.search(r"release (\d+\.\d+)", text.stdout)[1]
    return found


@dataclass(frozen=True)
class Limits:
    """``rows``: {key of a row: the most of each of ``FIELDS``, None where it has none}."""

    compilers: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[float | None]] = field(default_factory=dict)


def read(file: Path = FILE) -> Limits:
    """Those committed; none of any row without a file."""
    if not file.exists():
        return Limits()
    content = json.loads(file.read_text())
    if tuple(content["fields"]) != FIELDS:
        raise ValueError(f"{file}: limits of {content['fields']}, expected {list(FIELDS)}")
    return Limits(content["compilers"], content["rows"])


def write(records: Iterable[dict], file: Path = FILE, whole: bool = False) -> None:
    """These rows' figures as the new limits; ``whole``: rows that are not among them have none."""
    before = read(file)
    rows = {} if whole else dict(before.rows)
    rows |= {key(r): [_limit(r[name]) for name in FIELDS] for r in records if r["status"] == "ok"}
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    head = {"compilers": {**before.compilers, **compilers()}, "fields": FIELDS}
    text = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
    file.write_text(f'{{\n {text},\n "rows": {{\n  {lines}\n }}\n}}\n')


def _limit(value: float | None) -> float | None:
    """With the slack, rounded up to three digits."""
    if not value:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(_SLACK * value / unit) * unit:.3g}")


def violations(records: Iterable[dict], limits: Limits, whole: bool = False) -> list[str]:
    """Rows that failed, pass a limit or have none, one line each.

    ``whole``: a limit of no row is wrong as well.
    """
    problems, names = [], set()
    same = {b for b, version in compilers().items() if limits.compilers.get(b, version) == version}
    for row in records:
        names.add(key(row))
        if row["status"] != "ok":
            problems.append(f"{key(row)}: {row['reason']}")
        elif row["backend"] in same:
            problems += _above(row, limits.rows.get(key(row)))
    if whole:
        problems += [f"{name}: a limit, but no such row" for name in limits.rows.keys() - names]
    return problems


def _above(row: dict, limit: list[float | None] | None) -> list[str]:
    if limit is None:
        return [f"{key(row)}: no committed limit"]
    return [
        f"{key(row)}: {name} is {row[name]}, limit {most}"
        for name, most in zip(FIELDS, limit)
        if row[name] is not None and (most is None or row[name] > most)
    ]


def uncompared(limits: Limits) -> list[str]:
    """Which backends' limits are for another compiler, one line each."""
    return [
        f"{backend}: compiled by {compilers()[backend]}, the limits are for {version}: not compared"
        for backend, version in limits.compilers.items()
        if compilers().get(backend, version) != version
    ]
