"""Runs groups of stages, each within its limit; every case in a worker that may die."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from bench.device import faults
from bench.device.groups import Group
from bench.device.result import CUT_SHORT, Result
from bench.device.stage import SKIPPED, Setting, Stage
from dbp_kernels.verify.workers import (
    CRASHED,
    HUNG,
    NOT_RUN,
    PASSED,
    RAISED,
    breaks_the_context,
    run_cases,
)

# A family that keeps crashing and hanging takes the time of all others: at this many points the rest
# of its cases in the stage is left out.
_POINTS, _MOST_POINTS = {CRASHED: 1, HUNG: 2}, 4


def run_stage(
    stage: Stage,
    setting: Setting,
    deadline: float,
    record: Callable[[dict], None],
) -> None:
    """Records every case of a stage, until its limit or the deadline (of time.monotonic)."""
    points: Counter[str] = Counter()

    def heard(line: dict) -> None:
        status = line["status"]
        if status == RAISED and breaks_the_context(line):  # its worker had to end as well
            status = CRASHED
        points[stage.family(line["case"])] += _POINTS.get(status, 0)
        record(line)

    def skip(name: str) -> str | None:
        family = stage.family(name)
        if points[family] < _MOST_POINTS:
            return None
        return f"{family} has crashed or hung too often in this stage"

    begin = time.monotonic()
    deadline = min(deadline, begin + stage.seconds)
    cases = stage.cases(replace(setting, left=deadline - begin))
    if setting.rehearse:
        cases = faults.among(cases)
    command = [sys.executable, "-m", "bench.device.child", stage.name, setting.to_text()]
    run_cases(
        command,
        cases,
        workers=_workers(stage),
        deadline=deadline,
        record=heard,
        env={**_environment(stage, setting), **stage.env},
        skip=skip,
    )


def _workers(stage: Stage) -> int:
    """At most one a core: they compile."""
    return min(stage.workers, os.cpu_count() or 1)


def _environment(stage: Stage, setting: Setting) -> dict[str, str]:
    on_cpu = setting.device == "cpu"
    threads = 1 if on_cpu else (os.cpu_count() or 1) // _workers(stage)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TRITON_INTERPRET": "1" if on_cpu else "0",
        # what is measured is the package's own choice, whatever was verified on this machine
        "DBP_BACKEND": "auto",
        "DBP_VERIFY": "off",
    }


def run_groups(
    groups: Sequence[Group],
    setting: Setting,
    result: Result,
    begin: float,
    deadline: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs all stages of all groups; True if all passed. SIGTERM and Ctrl-C end the run early.

    A failing stage does not keep the next from running. The first group's time counts from
    ``begin``, every other's from its start.
    """
    statuses = []
    names = [stage.name for group in groups for stage in group.stages]
    result.content["checks"].update({name: {"status": NOT_RUN, "cases": []} for name in names})
    result.save()
    try:
        with terminated():
            for group in groups:
                end = min(deadline, begin + group.seconds)
                for stage in group.stages:
                    statuses.append(_run(stage, setting, result, end, say))
                begin = time.monotonic()
    except KeyboardInterrupt:
        say("interrupted")
    done = len(statuses) == len(names)
    result.content["complete"] = done and CUT_SHORT not in statuses
    result.save()
    return done and set(statuses) <= {PASSED, SKIPPED}


def _run(
    stage: Stage, setting: Setting, result: Result, end: float, say: Callable[[str], None]
) -> str:
    begin = time.monotonic()

    def record(line: dict) -> None:
        result.add(stage.name, line)
        if line["status"] not in (PASSED, SKIPPED, NOT_RUN):
            reason = str(line.get("reason", "-")).splitlines() or ["-"]
            say(f"  {line['case']}: {line['status']}: {reason[0][:150]}")

    try:
        run_stage(stage, setting, end, record)
    except Exception as error:  # cases could not be listed, say: the next stage may be better off
        reason = f"{type(error).__name__}: {error}"
        record({"case": "the stage itself", "status": "raised", "seconds": 0.0, "reason": reason})
    finally:
        status = result.close_stage(stage.name, time.monotonic() - begin)
        outcomes = result.content["checks"][stage.name]["outcomes"]
        counts = ", ".join(f"{n} {what}" for what, n in outcomes.items())
        say(f"{stage.name}: {status} in {time.monotonic() - begin:.1f} s ({counts or 'no cases'})")
    return status


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that the result is still written."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
