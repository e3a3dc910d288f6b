"""Versions and machine, as far as they matter for repeating a run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.planning.calibration import cpu_name


def environment() -> dict[str, Any]:
    """Ready for JSON."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in (
        "dbp-kernels",
        "numpy",
        "scipy",
        "scikit-learn",
        "pyarrow",
        "pillow",
        "matplotlib",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processor": cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "command": ["python", "-m", "experiments", *sys.argv[1:]],
    }


def _commit() -> str | None:
    """The checkout's commit, with "+changes" when tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent
    packed = root / "packed.json"  # no checkout, but a folder made of one for another machine
    if packed.is_file():
        made: dict[str, Any] = json.loads(packed.read_text())
        return f"{made['commit']}+changes" if made["dirty"] else made["commit"]
    try:

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(root), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        changes = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
