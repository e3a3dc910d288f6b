"""``python -m bench device-check``: everything that only a machine with a GPU can tell, in one command.

Tests of the kernels, the benchmark on the registry, whole training steps, the rest of the suite.
One result file, bench/results/<gpu>-<commit>.json, in the format of other results with "checks"
(one record a stage) added; it is written after every stage and case, so a run that is cut short
leaves what it has. Exit status 0 only if every stage passed and was complete.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import bars, machine, peaks, registry, report, table
from .kernels import Settings, default_methods, run_case
from .stages import FAILED, PASSED, Run, Stage, pytest_stage, run_stages
from .steps import BP, GPU_STEP_CASES, OURS, run_step_case

RESULTS = Path(__file__).resolve().parent / "results"
DTYPE, PAIRS = torch.bfloat16, 9
BATCHES = (256, 26)  # a training batch, and 10 % of it: what DecorUpdate samples

# What a stage may take, in seconds; together below ten minutes on an H200 by estimate, and the
# budget ends the run in any case. The most telling stages come first.
KERNEL_TESTS, BENCH, STEPS, ALL_TESTS = 200, 170, 90, 120


def kernel_tests(run: Run) -> dict:
    """Kernels on the device: oracle, every configuration, poison, graphs, streams, memory."""
    jobs = ["-n", "8"] if _has_xdist() else []
    return pytest_stage(run, [*jobs, "-m", "gpu", "tests"], {"TRITON_INTERPRET": "0"})


def all_tests(run: Run) -> dict:
    """The rest of the suite on this machine; compilation for other GPUs needs no GPU."""
    jobs = ["-n", "12"] if _has_xdist() else []
    marks = "not gpu and not slow and not aot and not ptx and not interpreter"
    return pytest_stage(run, [*jobs, "-m", marks, "tests"], {"TRITON_INTERPRET": "0"})


def _has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None


def bench_cases(batches: Sequence[int] = BATCHES) -> list[registry.Case]:
    """ResNet layers at the batches of the bars, then the rest of the registry as it is."""
    found = [case for n in batches for case in registry.select("resnet", n)]
    names = {case.name for case in found}
    return found + [case for case in registry.select() if case.name not in names]


def bench(run: Run) -> dict:
    """patch_gram against its rivals."""
    device = torch.device(run.result["settings"]["device"])
    run.result["peaks"] = peaks.measure(device, DTYPE)
    settings = Settings(device=device, dtype=DTYPE, pairs=PAIRS, channels_last=True)
    # compiling anew for every case would take the stage's time
    methods = {k: method for k, method in default_methods(device).items() if k != "compiled"}
    for case in bench_cases():
        run.check_time()
        record = run_case(case, settings, methods, tick=run.check_time)
        peaks.add_fractions(record, run.result["peaks"])
        run.result["kernels"].append(record)
        run.save()
    return _judged(run.result["kernels"])


def steps(run: Run) -> dict:
    """Whole training steps of the ResNets, plain, decorrelated, with the faster updates."""
    device = torch.device(run.result["settings"]["device"])
    settings = Settings(device=device, dtype=DTYPE, pairs=PAIRS, channels_last=True)
    for case in GPU_STEP_CASES:
        run.check_time()
        methods = BP, OURS
        record = run_step_case(case, settings, methods=methods, faster=True, tick=run.check_time)
        run.result["step"].append(record)
        run.save()
    return _judged(run.result["step"])


def _judged(records: list[dict]) -> dict:
    ours = {record["name"]: record["methods"][OURS] for record in records}
    wrong = {name: m.get("reason", m["status"]) for name, m in ours.items() if m["status"] != "ok"}
    if wrong or not records:
        return {"status": FAILED, "cases": len(records), "wrong": wrong}
    return {"status": PASSED, "cases": len(records)}


STAGES = (
    Stage("kernel tests", KERNEL_TESTS, kernel_tests),
    Stage("bench", BENCH, bench),
    Stage("steps", STEPS, steps),
    Stage("all tests", ALL_TESTS, all_tests),
)


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[2:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    if options.installed:
        return _start_beside_the_source([a for a in arguments if a != "--installed"])
    if options.device == "cuda" and not torch.cuda.is_available():
        print("device-check needs a CUDA device and none is available", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high")
    result = _new_result(options, arguments)
    path = options.save or _free(RESULTS, result["machine"])
    run = Run(result, path, deadline=time.monotonic() + options.budget)
    passed = run_stages(stages, run)
    result["bars"] = bars.as_records(bars.evaluate(result))
    run.save()
    text = summary(result)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    print(f"\nsaved {path}")
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench device-check", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--budget", type=float, default=570, help="seconds in all (default: 570)")
    out.add_argument("--save", type=Path, help="default: bench/results/<gpu>-<commit>.json")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    out.add_argument("--commit", help="of the code, where there is no git to ask")
    out.add_argument(
        "--installed",
        action="store_true",
        help="check the installed package (a wheel, say) instead of this folder's source",
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


def _new_result(options: argparse.Namespace, arguments: Sequence[str]) -> dict:
    import dbp_kernels
    from dbp_kernels import info

    described = machine.describe(options.device)
    if options.commit:
        described["commit"] = options.commit
    return {
        "format": 1,
        "command": shlex.join(["python", "-m", "bench", "device-check", *arguments]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "machine": described,
        "package": {"version": dbp_kernels.__version__, "path": str(Path(dbp_kernels.__file__))},
        "environment": info.environment(),
        "settings": {
            "suite": "all",
            "device": options.device,
            "dtype": str(DTYPE).removeprefix("torch."),
            "channels_last": True,
            "whole_registry": False,
        },
        "kernels": [],
        "step": [],
    }


def _free(folder: Path, described: dict) -> Path:
    """<gpu>-<commit>.json, with a number if there is one already: nothing is overwritten."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(described.get("gpu", "cpu")).lower()).strip("-")
    commit = described.get("commit")
    stem = f"{gpu}-{str(commit)[:10] if commit else 'unknown'}"
    names = [f"{stem}.json", *(f"{stem}-{n}.json" for n in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


def summary(result: dict) -> str:
    """The short table: stages, then the tables of the benchmark."""
    rows = [["stage", "status", "seconds", "what"]]
    for name, check in result["checks"].items():
        counts = check.get("outcomes") or {k: v for k, v in check.items() if k == "cases"}
        what = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or check.get("reason", "-")
        rows.append([name, check["status"], str(check.get("seconds", "-")), what])
    failures = [
        f"{name}: {failure['test']}"
        for name, check in result["checks"].items()
        for failure in check.get("failures", ())
    ]
    parts = [table.format_table(rows), "\n".join(failures)]
    return "\n\n".join(part for part in (*parts, report.text_report(result)) if part)
