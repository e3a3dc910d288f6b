"""Named stages one after the other, within a time budget; what is there is on disk after each.

A stage is a function (Run) -> record with "status": PASSED or FAILED, and whatever it found. It may
be cut short by its time limit, by SIGTERM or by Ctrl-C; then the record says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, CUT_SHORT, NOT_RUN = "passed", "failed", "cut short", "not run"


class CutShort(BaseException):
    """The time is up. Not an Exception: code that survives a failing method must not survive it."""


@dataclass(frozen=True)
class Stage:
    """``seconds``: the most it may take."""

    name: str
    seconds: float
    run: Callable[[Run], dict]


@dataclass
class Run:
    """A run of stages: its result so far, where that is written, and when it has to be over."""

    result: dict
    path: Path
    deadline: float
    limit: float = field(default=0.0)  # of the current stage

    @property
    def left(self) -> float:
        """Seconds left for the current stage."""
        return self.limit - time.monotonic()

    def check_time(self) -> None:
        """Ends the stage when its time is up."""
        if self.left <= 0:
            raise CutShort

    def save(self) -> None:
        """Replaces the file in one step: a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(self.path)


def run_stages(stages: Sequence[Stage], run: Run) -> bool:
    """Runs all of them; True if all passed. A failing stage does not keep the next from running."""
    checks = run.result["checks"] = {stage.name: {"status": NOT_RUN} for stage in stages}
    run.save()
    try:
        with _terminated():
            for stage in stages:
                checks[stage.name] = _run(stage, run)
                run.save()
    except (CutShort, KeyboardInterrupt):  # between two stages
        pass
    run.result["complete"] = all(c["status"] in (PASSED, FAILED) for c in checks.values())
    run.save()
    return all(c["status"] == PASSED for c in checks.values())


def _run(stage: Stage, run: Run) -> dict:
    begin = time.monotonic()
    run.limit = min(run.deadline, begin + stage.seconds)
    found: dict = {}
    run.result["checks"][stage.name] = found
    try:
        run.check_time()
        found.update(stage.run(run))
    except CutShort:
        found["status"] = CUT_SHORT
    except KeyboardInterrupt:
        found["status"] = CUT_SHORT
        run.deadline = time.monotonic()  # nothing else starts
    except Exception as failure:
        found.update(status=FAILED, reason=f"{type(failure).__name__}: {failure}"[:500])
    found["seconds"] = round(time.monotonic() - begin, 1)
    return found


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that the result is still written."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pytest_stage(
    run: Run, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict:
    """Runs pytest in a process of its own; counts outcomes even if it has to be stopped."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_log", *arguments]
        env = {**os.environ, **(environment or {}), "DBP_TEST_LOG": str(log)}
        env.pop("PYTEST_XDIST_WORKER", None)
        with (Path(folder) / "output").open("w+") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(0.1, run.left))
                status = PASSED if code == 0 else FAILED
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
                status = CUT_SHORT
                if isinstance(end, KeyboardInterrupt):
                    run.deadline = time.monotonic()
            finally:
                _stop(process)
            output.seek(0)
            tail = output.read()[-1500:]
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    record: dict = {"status": status, "outcomes": counts}
    record["failures"] = [line for line in lines if line["outcome"] == "failed"][:50]
    if record["failures"]:
        record["status"] = FAILED
    if status != PASSED:
        record["output"] = tail
    elif not counts.get("passed"):
        record.update(status=FAILED, reason="no test ran")
    return record


def _stop(process: subprocess.Popen) -> None:
    """Ends the process and those it started (it leads their group)."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, kind)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
