"""Works through the runs of studies, one at a time: ``python -m experiments queue STUDY...``.

It can be stopped at any moment, by Ctrl-C, ``--minutes`` or a power cut, and started again: a run
that is over is never repeated, one that was stopped goes on from its checkpoint. Each run has a
process of its own, so that nothing one leaves behind, a crash included, reaches the next.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import worker
from experiments.choice import winners
from experiments.config import RunConfig
from experiments.extras import need
from experiments.pages import RESULTS, make
from experiments.records import (
    ATTEMPTS,
    PLANNED,
    STUDY,
    Record,
    attempts_at,
    read,
    read_run,
    write_planned,
)
from experiments.study import PlannedRun, Study, load

ROOT = Path(__file__).resolve().parent.parent
LOG, LOCK = "output.txt", ".lock"
WAIT = 10.0  # seconds between two looks at runs in another queue's hands


class OutOfTime(Exception):
    """``--minutes`` are over: the run under way is left to be resumed."""


@dataclass(frozen=True)
class Options:
    """``deadline``: by ``time.monotonic``; None: none. ``data_dir``: None: as the studies say."""

    root: Path
    deadline: float | None = None
    data_dir: str | None = None
    retry_failed: bool = False
    progress: bool | None = None  # None: on a terminal


Launch = Callable[[Path, Options, int], int]


def launch(folder: Path, options: Options, lock: int) -> int:
    """Runs the worker on ``folder``, and returns its exit status; ends it if told to stop.

    The lock goes along: should the queue be killed, no other one touches the run while its orphan
    is at it.
    """
    command = [sys.executable, "-m", "experiments.worker", str(folder.resolve())]
    command += [] if options.data_dir is None else [str(Path(options.data_dir).resolve())]
    with (folder / LOG).open("ab") as log:
        # A session of its own: Ctrl-C at the terminal reaches the queue alone, which passes it on.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True
        )
        try:
            while True:
                left = None if options.deadline is None else options.deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise OutOfTime
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(left)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def launch_here(folder: Path, options: Options, lock: int) -> int:
    """Makes the run in this process: no start of Python for each, but a crash ends the queue too."""
    gc.collect()  # what the run before has left on a GPU is no memory of this one
    try:
        worker.main(folder, options.data_dir)
    except Exception:
        (folder / LOG).write_text(traceback.format_exc())
        return 1
    return 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """The lock of a run's folder, as a file descriptor; None if another queue has it.

    The system lets go of it when the last process that holds it ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _cpu_seconds() -> float:
    """Of this process and all its children that have ended: with one run at a time, differences are
    that run's."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _append(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _last_words(folder: Path) -> str:
    """The last line that a failed run wrote: of a Python error its type and message."""
    file = folder / LOG
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def attempt(folder: Path, planned: PlannedRun, options: Options, launch: Launch) -> bool:
    """Makes one run, or goes on with it; returns whether it was this queue's to make."""
    with locked(folder) as lock:
        if lock is None:
            return False
        write_planned(folder, planned)
        if _over(read_run(folder), options):  # another queue was at it in the meantime
            return True
        _append(folder, {"began": time.time(), "load": os.getloadavg()[0]})
        begin, cpu = time.monotonic(), _cpu_seconds()
        ending: dict[str, Any] = {"outcome": "stopped"}
        try:
            status = launch(folder, options, lock)
            ending["outcome"] = "ended" if (folder / "result.json").is_file() else "failed"
            if ending["outcome"] == "failed":
                ending["error"] = f"exit status {status}: {_last_words(folder)}"
        finally:
            ending["wall_seconds"] = round(time.monotonic() - begin, 2)
            ending["cpu_seconds"] = round(_cpu_seconds() - cpu, 2)
            _append(folder, ending)
    return True


def _over(record: Record, options: Options) -> bool:
    return record.over and not (record.status == "failed" and options.retry_failed)


def _to_make(folder: Path, options: Options) -> bool:
    return not ((folder / PLANNED).is_file() and _over(read_run(folder), options))


def _phases(study: Study, folder: Path) -> Iterator[list[PlannedRun]]:
    """The trials and, asked for once all of these are over, the final runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STUDY).write_text(study.text)
    yield list(study.tuning_runs())
    yield list(study.final_runs(winners(study, read(folder)[1], folder)))


def make_next(study: Study, options: Options, most_lost: int = 2) -> Record | None:
    """Makes the first run of ``study`` that is to be made, in this process: a trial or, once all of these
    are over, a final run. None: there is none.

    For processes that may be killed: a run that was lost with its process ``most_lost`` times has
    failed, so that the others have their turn.
    """
    folder = options.root / study.name
    runs = (planned for phase in _phases(study, folder) for planned in phase)
    planned = next((p for p in runs if _to_make(folder / p.id, options)), None)
    if planned is None:
        return None
    run = folder / planned.id
    lost = sum("outcome" not in attempt for attempt in attempts_at(run))
    if lost >= most_lost:
        _append(run, {"outcome": "failed", "error": f"its process was lost {lost} times"})
    else:
        attempt(run, planned, options, launch_here)
    return read_run(run)


def work(study: Study, options: Options, launch: Launch = launch) -> bool:
    """Makes all runs of ``study`` that are to be made; returns whether all of them are over.

    Raises:
        ValueError: a configuration of the study makes no sense, or the study named by
            ``winners_from`` has no winners yet.
        KeyboardInterrupt, OutOfTime: the run under way is left to be resumed.
    """
    folder = options.root / study.name
    tqdm = need("tqdm", "tqdm", "the progress bar").tqdm
    total = study.count_runs()
    hidden = None if options.progress is None else not options.progress
    begin, seen, made = time.monotonic(), 0, 0
    with tqdm(total=total, unit="run", disable=hidden, desc=study.name, leave=False) as bar:

        def through(planned_runs: list[PlannedRun]) -> bool:
            nonlocal seen, made
            free = True
            for planned in planned_runs:
                run = folder / planned.id
                bar.set_postfix_str(planned.id)
                seen += 1
                if _to_make(run, options):
                    if options.deadline is not None and time.monotonic() >= options.deadline:
                        raise OutOfTime
                    if attempt(run, planned, options, launch):
                        made += 1
                        left = (time.monotonic() - begin) / made * (total - seen) / 60
                        bar.write(f"{_told(read_run(run))}; {seen}/{total}, {left:.0f} min left")
                    else:
                        free = False
                bar.update()
            return free

        return all(map(through, _phases(study, folder)))


def work_all(
    studies: Sequence[Study], options: Options, launch: Launch = launch
) -> Iterator[Study]:
    """Each study as soon as it is over. One that waits for runs in another queue's hands has its turn
    again after the others. Raises as `work`."""
    left, told = list(studies), False
    while left:
        held = []
        for study in left:
            if work(study, options, launch):
                yield study
            else:
                held.append(study)
        if held and len(held) == len(left):
            if options.deadline is not None and time.monotonic() >= options.deadline:
                raise OutOfTime
            if not told:
                print(f"{held[0].name}: waits for runs in another queue's hands")
            told = True
            time.sleep(WAIT)
        left = held


def _told(record: Record) -> str:
    """A line for the log of a queue that is left alone."""
    text = f"{time.strftime('%H:%M:%S')} {record.id}: {record.status}"
    if record.rows:
        text += f", validation score {record.rows[-1]['validation_score']:.4g}"
    return f"{text} {record.error}".rstrip()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "studies", nargs="+", metavar="STUDY", help="names, or YAML files, in order"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long, as Ctrl-C does")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (runs)")
    parser.add_argument("--results", type=Path, help="folder of the reports")
    parser.add_argument("--data-dir", help="folder of the data sets, instead of the studies' own")
    parser.add_argument("--retry-failed", action="store_true", help="make failed runs once more")
    parser.add_argument(
        "--here", action="store_true", help="no process for each run: quicker if tiny, less safe"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(given: argparse.Namespace) -> int:
    """Returns 0 when all is over, 3 when runs are left, 130 when interrupted."""
    studies: Sequence[Study] = [load(name) for name in given.studies]
    for study in studies:
        check(study)
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    progress = False if given.no_progress else None
    options = Options(given.runs, deadline, given.data_dir, given.retry_failed, progress)
    launcher = launch_here if given.here else launch
    status = 0
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        for study in work_all(studies, options, launcher):
            print(make(options.root / study.name, given.results or RESULTS))
    except OutOfTime:
        print("time is over; the same command goes on", file=sys.stderr)
        status = 3
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return status


def check(study: Study) -> None:
    """Raises ValueError for a configuration that the training program would refuse."""
    for group in study.groups:
        for method in study.methods.values():
            RunConfig().override(study.config(group, method))
    for planned in study.tuning_runs():
        RunConfig().override(planned.config)
