"""The compiled library for tests: what ``make cuda`` built, else built for two targets and kept."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench.counters.build_folder import build_folder

ROOT = Path(__file__).resolve().parents[3]


@functools.cache
def script(name: str) -> ModuleType:
    """csrc/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"csrc_{name}", ROOT / "csrc" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@functools.cache
def _built() -> tuple[Path, str]:
    build = script("build")
    reason = build.missing()
    if reason:
        pytest.skip(reason)
    path, targets = build.DIRECTORY, build.requested_architectures()
    if not (path / build.LIBRARY).is_file():
        path = build_folder("cuda")
        targets = "8.0;9.0a"
    build.build(path, targets, jobs=os.environ.get("MAX_JOBS", "2"))
    return path, targets


def directory() -> Path:
    """Where the library is built, and up to date; skips the test where it cannot be."""
    return _built()[0]


def targets() -> str:
    """What it is built for, as TORCH_CUDA_ARCH_LIST."""
    return _built()[1]


def library() -> Path:
    """The library's file."""
    return directory() / script("build").LIBRARY
