"""``metrics.csv``: what is known of a run after each of its epochs."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One epoch.

    Attributes:
        epoch, step, examples: done so far, epochs from 1.
        seconds: of training so far; neither evaluation nor checkpoints.
        train_loss, train_score: means over the epoch's batches as they were trained on.
        validation_loss, validation_score, test_loss, test_score: of the network after the epoch.
        lr: of the epoch's last step.
        decorrelation_loss: mean over layers at the last update; ``None`` without DBP.
    """

    epoch: int
    step: int
    examples: int
    seconds: float
    train_loss: float
    train_score: float
    validation_loss: float
    validation_score: float
    test_loss: float
    test_score: float
    lr: float
    decorrelation_loss: float | None


COLUMNS = [field.name for field in dataclasses.fields(Row)]


def to_csv(rows: Sequence[Row]) -> str:
    """Floats in as many digits as bring back the same number; ``None`` is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


def read(path: Path) -> list[Row]:
    """Raises FileNotFoundError, and ValueError where the columns are others."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
        if lines and list(lines[0]) != COLUMNS:
            raise ValueError(f"{path} has the columns {list(lines[0])}: expected {COLUMNS}")
    return [_row(line) for line in lines]


def _row(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {name: float(cell) if cell else None for name, cell in line.items()}
    ints = {name: int(line[name]) for name in ("epoch", "step", "examples")}
    return Row(**{**values, **ints})
