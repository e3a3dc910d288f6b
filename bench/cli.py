"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import suites
from bench.core import bars, machine, report, results
from bench.core.suite import DTYPES, Job
from bench.options import inconsistency, parser
from dbp_kernels.tools import timing

# {command: the module that runs it}, imported on demand
COMMANDS = {
    "check": "bench.core.regress",
    "counters": "bench.counters.command",
    "device-check": "bench.device.command",
    "host-time": "bench.suites.host_time",
    "long-run": "bench.suites.long_run",
    "precision": "bench.suites.precision",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (1: some method of ours was wrong)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = COMMANDS.get(arguments[0]) if arguments else None
    if own is not None:
        return importlib.import_module(own).main(arguments[1:])
    if arguments[:1] == ["report"]:
        return _report(arguments[1:])
    options = parser().parse_args(arguments)
    target = _target(options)
    if target is not None and target.exists():
        print(f"{target} exists and is not overwritten; name another with --save", file=sys.stderr)
        return 2
    problem = inconsistency(options)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    try:
        jobs = suites.jobs(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not jobs:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(options.matmul_precision)
    try:
        with timing.threads(options.threads), timing.cpu_time(options.cpu_time):
            result = _measure(options, arguments, jobs)
    finally:
        torch.set_float32_matmul_precision(precision)
    print(report.text_report(result))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        results.save(result, target)
        print(f"\nsaved {target}")
    right = not report.problems(result["regret"]) and all(
        record["methods"][bars.OURS]["status"] == "ok"
        for record in report.judged_records(result)
        if bars.OURS in record["methods"]
    )
    return 0 if right and result["complete"] else 1


def _target(options: argparse.Namespace) -> Path | None:
    if options.save is None:
        return None
    if options.save:
        return Path(options.save)
    commit = machine.commit()
    return results.RESULTS / f"{options.device.type}-{commit[:10] if commit else 'unknown'}.json"


def _measure(options: argparse.Namespace, arguments: Sequence[str], jobs: Sequence[Job]) -> dict:
    """Runs the jobs; an interrupt ends the run early and keeps what is there."""
    from tqdm import tqdm

    begin = time.perf_counter()
    whole = not (options.filter or options.batch or options.quick or options.methods)
    whole = whole and (options.suite == "kernels" or options.sample == bars.SAMPLE)
    result: dict = {
        "format": 1,
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "machine": machine.describe(options.device),
        "settings": {
            "suite": options.suite,
            "device": options.device.type,
            "dtype": options.dtype,
            "channels_last": options.channels_last,
            "clock": "CPU time" if options.cpu_time else "wall clock",
            "whole_registry": whole and options.suite in ("kernels", "regret", "all"),
        },
        **{suite: [] for suite in suites.RUN},
    }
    if any(job.suite in ("kernels", "scaling") for job in jobs):
        result["peaks"] = machine.peaks(options.device, DTYPES[options.dtype])
    with tqdm(total=sum(job.rounds for job in jobs), unit="round", leave=False) as progress:
        try:
            for suite, name, run, rounds in jobs:
                progress.set_description(name)
                done = progress.n
                record = run(progress.update)
                if suite in ("kernels", "scaling"):
                    machine.add_fractions(record, result["peaks"])
                result[suite].append(record)
                progress.update(done + rounds - progress.n)
            result["complete"] = True
        except KeyboardInterrupt:
            result["settings"]["whole_registry"] = False
    result["took_seconds"] = round(time.perf_counter() - begin)
    result["bars"] = bars.as_records(bars.evaluate(result))
    return result


def _report(arguments: Sequence[str]) -> int:
    out = argparse.ArgumentParser(
        prog="python -m bench report", description="Tables and plot from a saved result."
    )
    out.add_argument("--adopt", action="store_true", help="put what a device check found to use")
    out.add_argument("--force", action="store_true", help="adopt another version's result too")
    out.add_argument("file", type=Path, help="a result that --save wrote")
    out.add_argument("--plot", type=Path, metavar="PNG", help="default: beside FILE")
    options = out.parse_args(arguments)
    if options.adopt:
        from bench.core import adopt

        return adopt.main(options.file, options.force)
    try:
        result = json.loads(options.file.read_text())
        text = report.text_report(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{options.file}: not a result file: {error}", file=sys.stderr)
        return 2
    print(text)
    picture = options.plot or options.file.with_suffix(".png")
    if report.plot(result, picture):
        print(f"\ndrew {picture}")
    return 0
