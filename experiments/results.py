"""A results directory: ``config.json`` and ``metrics.csv``, one line per epoch, written as made."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from experiments.configs import GRID_FIELDS, Config, Setting
from experiments.environment import environment
from experiments.loop import Row

COLUMNS = [field.name for field in fields(Row)]
OUTPUTS = ("config.json", "metrics.csv", "summary.md", "curves.png")


@dataclass(frozen=True)
class Run:
    """The epochs of one setting and one seed, in order."""

    setting: Setting
    seed: int
    rows: list[Row]


def read_rows(path: Path) -> list[Row]:
    """Reads ``metrics.csv``. A last line cut short by an interruption is left out.

    Raises ValueError when the columns are not the ones this version writes.
    """
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != COLUMNS:
            raise ValueError(f"{path}: expected the columns {COLUMNS}, found {header}")
        lines = list(reader)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parse(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number + 1}: {error}") from error
    return rows


def _parse(line: list[str]) -> Row:
    if len(line) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} values, found {len(line)}")
    text = dict(zip(COLUMNS, line, strict=True))
    values: dict[str, Any] = {"method": text.pop("method")}
    for name in ("seed", "epoch"):
        values[name] = int(text.pop(name))
    for name in ("decor_lr", "decorrelation_loss"):
        cell = text.pop(name)
        values[name] = float(cell) if cell else None
    return Row(**values, **{name: float(cell) for name, cell in text.items()})


def group_runs(rows: list[Row]) -> list[Run]:
    """Rows -> runs, in the order in which they were first seen, epochs sorted."""
    groups: dict[tuple[Setting, int], list[Row]] = {}
    for row in rows:
        key = (Setting(row.method, row.lr, row.decor_lr), row.seed)
        groups.setdefault(key, []).append(row)
    return [Run(s, seed, sorted(g, key=lambda r: r.epoch)) for (s, seed), g in groups.items()]


class ResultsDirectory:
    """Opens a directory for a comparison.

    Args:
        path: the directory; made if it is not there.
        config: what is going to run.
        overwrite: remove an earlier comparison's files first.
        resume: keep an earlier comparison's finished runs; unfinished ones start again.

    Raises:
        FileExistsError: the directory is not empty and neither ``overwrite`` nor ``resume`` is set.
        ValueError: resuming with a configuration that differs in more than its grid.
    """

    def __init__(
        self, path: Path, config: Config, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        self.path = path
        self.config = config
        self.csv_path = path / "metrics.csv"
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} exists and is not a folder")
        occupied = path.is_dir() and any(path.iterdir())
        if occupied and not (overwrite or resume):
            raise FileExistsError(
                f"{path} already holds files: choose another --out, or give --resume to go on "
                "from its finished runs, or --overwrite to replace them"
            )
        kept: list[Row] = []
        if occupied and resume and self.csv_path.exists():
            self._check_same_protocol()
            kept = [
                row
                for run in group_runs(read_rows(self.csv_path))
                if run.rows[-1].epoch == len(run.rows) == config.epochs
                for row in run.rows
            ]
        path.mkdir(parents=True, exist_ok=True)
        if occupied and overwrite and not resume:
            for name in OUTPUTS:
                (path / name).unlink(missing_ok=True)
        self.finished = {(run.setting, run.seed) for run in group_runs(kept)}
        self._write_kept(kept)
        self._write_config()
        self._file: TextIO = self.csv_path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def _check_same_protocol(self) -> None:
        stored = read_config(self.path)
        changed = [
            f"{field.name} was {getattr(stored, field.name)!r}, "
            f"now {getattr(self.config, field.name)!r}"
            for field in fields(Config)
            if field.name not in GRID_FIELDS
            and getattr(stored, field.name) != getattr(self.config, field.name)
        ]
        if changed:
            raise ValueError(f"cannot resume {self.path}: {'; '.join(changed)}")

    def _write_kept(self, rows: list[Row]) -> None:
        temporary = self.csv_path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_cells(row) for row in rows)
        os.replace(temporary, self.csv_path)

    def _write_config(self) -> None:
        document = {"config": asdict(self.config), "environment": environment()}
        text = json.dumps(document, indent=2) + "\n"
        (self.path / "config.json").write_text(text)

    def write(self, row: Row) -> None:
        """Appends one epoch and flushes it, so that an interruption loses nothing."""
        self._writer.writerow(_cells(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultsDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cells(row: Row) -> list[Any]:
    return ["" if value is None else value for value in asdict(row).values()]


def read_config(path: Path) -> Config:
    """The configuration in ``path/config.json``; FileNotFoundError says so when there is none."""
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no comparison: config.json is missing")
    return Config.from_dict(json.loads(file.read_text())["config"])
