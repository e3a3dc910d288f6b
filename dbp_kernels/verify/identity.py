"""What a verdict depends on: device and driver, torch, Triton and its C compiler, this package's kernels."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.version import __version__

_FIELDS = (
    "family",
    "device",
    "capability",
    "driver",
    "torch",
    "cuda",
    "triton",
    "python",
    "compiler",
    "package",
    "kernels",
)


@lru_cache
def describe(family: str, index: int) -> dict[str, Any]:
    """Of cuda:``index``: {"family", "device", "capability", "driver", ...}, plain data."""
    major, minor = torch.cuda.get_device_capability(index)
    values = (
        family,
        torch.cuda.get_device_name(index),
        10 * major + minor,
        driver(),
        torch.__version__,
        torch.version.cuda,
        _version("triton"),
        platform.python_version(),
        _compiler(),
        __version__,
        _digest(),
    )
    return dict(zip(_FIELDS, values))


def key(where: dict[str, Any]) -> str:
    """A file name for everything in ``where``."""
    text = json.dumps(where, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def driver() -> str:
    """The GPU driver's version, e.g. "580.159.04", or the CUDA version it is for."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:  # WSL, containers that hide it
        return f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """What Triton starts kernels with: one container may lack it that another with this home has."""
    wanted = os.environ.get("CC")
    return shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")


def _digest() -> str:
    """Of the backends' files, which a clone changes without a new version."""
    digest = hashlib.sha256()
    package = files(f"{__package__.rpartition('.')[0]}.backends")
    for path in sorted(Path(str(package)).rglob("*")):
        if path.suffix in (".py", ".json", ".so"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
