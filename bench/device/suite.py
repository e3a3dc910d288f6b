"""Stage of the test suite's GPU tests, a file at a time; every test's outcome is a line at once.

The lines are in <result>-tests.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from bench.core import machine
from bench.device.stage import SKIPPED, Setting, Stage
from dbp_kernels.verify.workers import Case

_LIMIT = 90.0
_FIRST = ("test_cuda_device.py", "test_device.py")  # what only a device shows
_NEEDED = ("pytest", "hypothesis")
_NO_TESTS = 5  # pytest's exit code


def files() -> list[Path]:
    """Those with tests marked "gpu": all of Triton's are, where there is a GPU."""
    tests = machine.ROOT / "tests"
    marked = [
        path
        for path in sorted(tests.rglob("test_*.py"))
        if path.parent.name == "triton" or "mark.gpu" in path.read_text()
    ]
    return sorted(marked, key=lambda path: path.name not in _FIRST)


def cases(setting: Setting) -> list[Case]:
    found = files()[:1] if setting.rehearse else files()
    return [Case(str(path.relative_to(machine.ROOT)), _LIMIT) for path in found]


def run(name: str, setting: Setting) -> dict:
    """Runs a file; a test that takes the CUDA context with it fails those after it."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        return {"status": SKIPPED, "reason": f"not installed: {', '.join(missing)}"}
    log = setting.beside("-tests.jsonl")
    options = [
        "-q",
        "-m",
        "gpu and not slow",
        "-p",
        "bench.device.pytest_log",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, name],
        cwd=machine.ROOT,
        env={**os.environ, "DBP_TEST_LOG": str(log.absolute())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if line["test"].startswith(f"{name}::")]
    found: dict = {"outcomes": dict(Counter(line["outcome"] for line in lines))}
    if done.returncode in (0, _NO_TESTS) and not found["outcomes"].get("passed"):
        return {"status": SKIPPED, "reason": "no test for this device", **found}
    if done.returncode:
        failures = [line for line in lines if line["outcome"] == "failed"]
        named = ", ".join(line["test"].split("::", 1)[1] for line in failures[:5])
        reason = f"{len(failures)} failed: {named}" if failures else done.stdout[-300:]
        found.update(status="failed", reason=reason, failures=failures[:50])
        found["output"] = done.stdout[-1500:]
    return found


TESTS = Stage("tests", 300, cases, run, workers=8, bare=True, family=lambda name: name)
