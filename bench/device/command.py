"""``python -m bench device-check``: everything that only a machine with a GPU can tell, in one command.

Groups of stages, ready for a visit to a machine: "first" (the kernels' checks, a time of each, a
step's ratio), "rest" (layers, steps, calibration, tuning, sanitizer, tests) and "train"; without a
name all of them. Every case runs in a process that may crash or hang, and is a line of
bench/results/<gpu>-<commit>.jsonl at once; the .json beside it is a result like others, with
"checks" added. Exit status: 0 all passed, 1 not all, 2 there is nothing to check here.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from bench.core import bars, machine
from bench.device import groups, pack
from bench.device.describe import DESCRIBE, FOUND
from bench.device.result import Result
from bench.device.runner import run_groups, run_stage
from bench.device.stage import DTYPE, RESULT, Setting
from bench.device.summary import summary
from dbp_kernels.tools.origin import slug
from dbp_kernels.verify.workers import PASSED

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[2:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.pack:
        return pack.main(options.pack, options.data, not options.no_download)
    if options.installed:
        return _start_beside_the_source([a for a in arguments if a != "--installed"])
    begin = time.monotonic()
    deadline = begin + options.budget
    stages = options.stages.split(",") if options.stages else []
    try:
        chosen = groups.chosen(options.groups, stages)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    setting = Setting("cuda:0" if options.device == "cuda" else "cpu")
    described: list[dict] = []
    run_stage(DESCRIBE, setting, deadline, described.append)
    if any(line.get("no_device") for line in described):
        print("device-check needs a CUDA device and none is available", file=sys.stderr)
        return 2
    known = _machine(options, described)
    stem = options.save or _free(RESULTS, known)
    stem = stem.with_suffix("") if stem.suffix == ".json" else stem
    found: dict = {}
    for line in described:
        found.update(line.get(FOUND, {}))
    setting = replace(setting, rehearse=options.rehearse, stem=str(stem.absolute()), machine=found)
    result = Result({**_header(options, arguments), "machine": known}, stem)
    for line in described:
        result.add(DESCRIBE.name, line)
    passed = result.close_stage(DESCRIBE.name, sum(d["seconds"] for d in described)) == PASSED
    try:
        if "gpu" in known or options.device == "cpu":  # else nothing can run there
            passed = run_groups(chosen, setting, result, begin, deadline) and passed
    finally:
        result.content["took_seconds"] = round(time.monotonic() - begin, 1)
        result.content["bars"] = bars.as_records(bars.evaluate(result.content))
        result.save()
    text = summary(result.content)
    result.path.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(f"\nsaved {result.path}")
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench device-check", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    known = [f"{name} (at most {group.seconds:g} s)" for name, group in groups.GROUPS.items()]
    out.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(known))
    names = ", ".join(stage.name for stage in groups.all_stages())
    out.add_argument("--stages", default="", metavar="A,B", help=f"only some of: {names}")
    out.add_argument("--budget", type=float, default=math.inf, help="seconds for all groups")
    out.add_argument("--save", type=Path, help="default: bench/results/<gpu>-<commit>.json")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    out.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, and cases that go wrong on purpose"
    )
    out.add_argument("--commit", help="of the code, where there is no git to ask")
    out.add_argument(
        "--installed",
        action="store_true",
        help="check the installed package (a wheel, say) instead of this folder's source",
    )
    packing = out.add_argument_group("for a machine without network")
    packing.add_argument(
        "--pack",
        type=Path,
        metavar="DIR",
        help="instead make this folder: wheel, tests, spare wheels and run.sh, which starts the check",
    )
    packing.add_argument(
        "--data", type=Path, help="a folder of CIFAR-10's parquet files, to go along"
    )
    packing.add_argument(
        "--no-download", action="store_true", help="no spare wheels from the index"
    )
    return out


def _start_beside_the_source(arguments: list[str]) -> int:
    """Becomes the same run in a folder that has the tests and the benchmark but no package."""
    folder = Path(tempfile.mkdtemp(prefix="dbp-device-check-"))
    for name in ("bench", "tests", "experiments", "pyproject.toml"):
        (folder / name).symlink_to(machine.ROOT / name)
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-m", "bench", "device-check", *arguments])
    return 1


def _machine(options: argparse.Namespace, described: Sequence[dict]) -> dict:
    """As the worker described it; what can be said without a GPU if it could not."""
    reported = [line[RESULT]["machine"] for line in described if RESULT in line]
    found = reported[0] if reported else machine.describe("cpu")
    return {**found, "commit": options.commit} if options.commit else dict(found)


def _header(options: argparse.Namespace, arguments: Sequence[str]) -> dict:
    return {
        "format": 1,
        "command": shlex.join(["python", "-m", "bench", "device-check", *arguments]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "settings": {
            "suite": "all",
            "device": options.device,
            "dtype": str(DTYPE).removeprefix("torch."),
            "channels_last": True,
            "whole_registry": False,
            "rehearsal": options.rehearse,
        },
    }


def _free(folder: Path, described: dict) -> Path:
    """<gpu>-<commit>.json, with a number if there is one already: nothing is overwritten."""
    gpu = slug(str(described.get("gpu", "cpu")))
    commit = described.get("commit")
    stem = f"{gpu}-{str(commit)[:10] if commit else 'unknown'}"
    names = [f"{stem}.json", *(f"{stem}-{n}.json" for n in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())
