"""Stage that runs a tiny launch of every kernel under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.device.stage import SKIPPED, Setting, Stage
from dbp_kernels.verify.workers import Case

TOOLS = ("memcheck", "racecheck")
_LIMIT, _ERROR = 60.0, 9
# Errors of API calls are torch's to report (libraries also probe for what is not there), and the host's
# frames are Python's: they would leave no room for the kernel's.
_OPTIONS = ("--error-exitcode", str(_ERROR), "--report-api-errors", "no", "--print-limit", "10")
_OPTIONS += ("--show-backtrace", "device")
_CODE = """
import sys
import torch
from dbp_kernels.verify import cases
device = torch.device(sys.argv[1])
for name in sys.argv[2:]:
    print("begin:", name, flush=True)
    cases.run(name, device)
    torch.cuda.synchronize()
"""


def find() -> str | None:
    """The tool, on the path or where CUDA is usually installed."""
    usual = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (str(usual[-1]) if usual else None)


def cases(setting: Setting) -> list[Case]:
    """One process for each tool and family: most of its time is its start."""
    return [Case(f"{tool}: {f}", _LIMIT) for tool in TOOLS for f in setting.machine["tiny"]]


def run(name: str, setting: Setting) -> dict:
    """What the tool says of the smallest check of each of the family's kernels."""
    sanitizer = find()
    if sanitizer is None:
        return {"status": SKIPPED, "reason": "there is no compute-sanitizer"}
    if setting.device == "cpu":
        return {"status": SKIPPED, "reason": "it watches GPUs"}
    tool, _, family = name.partition(": ")
    checks = setting.machine["tiny"][family]
    command = [sanitizer, "--tool", tool, *_OPTIONS, sys.executable, "-c", _CODE]
    # memory of torch's cache would hide an access beyond a tensor's end
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, said = _shown([*command, setting.device, *checks], env)
    if code == 0:
        return {"checks": checks}
    found = "errors found" if code == _ERROR else f"exit code {code}"
    return {"status": "failed", "reason": found, "output": said[-4000:]}


def _shown(command: list[str], env: dict[str, str]) -> tuple[int, str]:
    """(exit code, output) of a command; printed as it comes too, for who learns of a killed worker."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = []
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


SANITIZER = Stage("sanitizer", 45, cases, run, workers=4, bare=True)
