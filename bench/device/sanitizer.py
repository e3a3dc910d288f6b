"""Stage that runs a tiny launch of every kernel under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dbp_kernels.verify.workers import Case

from .stage import SKIPPED, Setting, Stage

TOOLS = ("memcheck", "racecheck")
_LIMIT, _ERROR = 60.0, 9
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
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_ERROR), sys.executable, "-c"]
    # memory of torch's cache would hide an access beyond a tensor's end
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, _CODE, setting.device, *checks],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return {"checks": checks}
    found = "errors found" if done.returncode == _ERROR else f"exit code {done.returncode}"
    return {"status": "failed", "reason": found, "output": done.stdout[-4000:]}


SANITIZER = Stage("sanitizer", 45, cases, run, workers=4, bare=True)
