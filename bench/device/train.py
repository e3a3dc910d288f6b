"""The stage of group ``train``: the runs of a study of ``experiments``, as far as time allows.

A case is the next run that is to be made; they lie in ``runs/`` as those of any queue, so that the
same command goes on where time was up, and ``<result>-runs.tar.gz`` has what a page is made of::

    tar xf train-runs.tar.gz && python -m experiments report runs/cifar10-airbench
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.core import machine
from bench.device.stage import RESULT, SKIPPED, Setting, Stage
from dbp_kernels.verify.workers import FAILED, PASSED, Case

if TYPE_CHECKING:  # other groups need nothing of what experiments import
    from experiments.queue import Options
    from experiments.records import Record
    from experiments.study import Study

STUDY, REHEARSED = "cifar10-airbench", "tiny-digits"
RUNS = machine.ROOT / "runs"
DATA = machine.ROOT / "data"  # CIFAR-10's parquet files, if there
IMAGES = "CIFAR-10's images"
SECONDS = 395.0
_LIMIT = 90.0  # seconds of a run, with all that comes before a process's first one
# Of a run's folder: all but TensorBoard's events and checkpoints.
_KEPT = (".yaml", ".json", ".jsonl", ".csv", ".txt")


def _study(setting: Setting) -> tuple[Study, Options]:
    from experiments.queue import Options
    from experiments.study import load

    root = setting.beside("-runs") if setting.rehearse else RUNS
    options = Options(root, data_dir=str(DATA), progress=False)
    return load(REHEARSED if setting.rehearse else STUDY), options


def _read_an_image() -> None:
    """Raises what any run would raise where data or a package are missing."""
    from experiments.data.parquet import read_split

    read_split("cifar10", DATA, "test", 1)


def cases(setting: Setting) -> list[Case]:
    """Where there are no images a single one that says so: a run that fails is not made again."""
    if not setting.rehearse:
        try:
            _read_an_image()
        except (OSError, ValueError, ImportError):
            return [Case(IMAGES, _LIMIT)]
    total = _study(setting)[0].count_runs()
    return [Case(f"run {number} of {total}", _LIMIT) for number in range(1, total + 1)]


def run(name: str, setting: Setting) -> dict:
    """Makes the next run, whichever it is."""
    if name == IMAGES:
        _read_an_image()
    from experiments.queue import LOG, make_next

    study, options = _study(setting)
    record = make_next(study, options)
    if record is None:
        return {"status": SKIPPED, "reason": "all runs are over"}
    archive(options.root / study.name, setting.beside("-runs.tar.gz"))
    told = {"status": PASSED, RESULT: {"runs": [summary(record)]}, "run": record.id}
    if record.status != "failed":
        return told
    # With the end of the traceback, whose last line need not be the one that says "CUDA error": by that it
    # is known that this process is of no use to the next run.
    log = options.root / study.name / record.id / LOG
    output = log.read_text()[-2000:] if log.is_file() else ""
    return told | {"status": FAILED, "reason": record.error, "output": output}


def summary(record: Record) -> dict:
    """For the result file; the archive has the rest."""
    last = record.rows[-1] if record.rows else {}
    return {
        "run": record.id,
        **{key: record.identity[key] for key in ("method", "phase", "trial", "seed")},
        "status": record.status,
        "epochs": len(record.rows),
        **{key: last.get(key) for key in ("seconds", "validation_score", "test_score")},
    }


def archive(folder: Path, path: Path) -> None:
    """What a study's runs have left, as ``runs/<study>/...``; replaces ``path`` in one step."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:gz") as file:
        for found in sorted(folder.rglob("*")):
            if found.suffix in _KEPT:
                file.add(found, Path("runs", folder.name, found.relative_to(folder)))
    partial.replace(path)


# Each case is a family of its own: what one method's runs crash in must not end the others'.
TRAINING = Stage("training", SECONDS, cases, run, family=lambda name: name)
