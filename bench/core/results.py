"""Result files: JSON, one case a line."""

from __future__ import annotations

import json
from pathlib import Path

from bench.core.machine import ROOT

RESULTS = ROOT / "bench" / "results"


def save(result: dict, path: Path) -> None:
    """Writes a result as JSON; raises FileExistsError rather than overwrite."""
    with path.open("x") as file:
        file.write(to_text(result))


def to_text(result: dict) -> str:
    """A result as JSON, one case a line."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f'"{key}": [\n  {items}\n]' if value else f'"{key}": []')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
