"""Builds csrc/emulation: the CUDA kernels' launchers on the CPU, as a Python module.

Its ``call`` runs a launcher on numpy arrays (bf16 as uint16), which are changed in place as on a
device, or only records the launches that it would make (``record``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.core.machine import ROOT
from bench.counters.build_folder import build_folder

CSRC = ROOT / "csrc"
SHARED_LIMIT = 227 * 1024  # bytes per block on sm_90; 99 KB on sm_86, 89 and 120, 163 on sm_80

_FLAGS = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DDBP_EMULATE",
]


class Missing(RuntimeError):
    """What this machine lacks to build or to run kernels, in one sentence."""


class LaunchError(RuntimeError):
    """A launcher returned a CUDA error: ``code`` is its number."""

    def __init__(self, kernel: str, code: int):
        super().__init__(f"{kernel}: CUDA error {code}")
        self.code = code


@functools.cache
def _cache() -> Path:
    return build_folder("emulation")


def _pybind11_include() -> str | None:
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    from torch.utils.cpp_extension import include_paths  # torch ships the headers too

    return next((p for p in include_paths() if (Path(p) / "pybind11").is_dir()), None)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


def _sources_of(file: Path) -> list[Path]:
    """The file and all it includes by a relative or a csrc path."""
    found, todo = [], [file]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.append(current)
        for name in re.findall(r'^#include "(.+)"', current.read_text(), re.M):
            candidates = [folder / name for folder in (current.parent, CSRC, CSRC / "kernels")]
            todo += [c.resolve() for c in candidates if c.exists()][:1]
    return sorted(found)


def build(sources: Iterable[Path], compiler: str, include: str) -> Path:
    """A Python module of these C++ files; every object is cached by the hash of all it is made of."""
    common = [" ".join([compiler, *_FLAGS]).encode(), sysconfig.get_python_version().encode()]
    cache = _cache()
    objects, jobs = [], []
    for source in sources:
        digest = _digest(*(f.read_bytes() for f in _sources_of(source)), *common)
        target = cache / f"{source.stem}-{digest}.o"
        objects.append(target)
        if not target.exists():
            jobs.append((source, target))

    def compile_one(job: tuple[Path, Path]) -> None:
        source, target = job
        scratch = target.with_suffix(f".{os.getpid()}.o")
        command = [compiler, *_FLAGS, f"-I{CSRC}", f"-I{CSRC}/kernels", f"-I{include}", "-c"]
        _run([*command, f"-I{sysconfig.get_paths()['include']}", str(source), "-o", str(scratch)])
        scratch.replace(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs))
    module = cache / f"dbp_emulation_{_digest(*(o.name.encode() for o in objects))}.so"
    if not module.exists():
        scratch = cache / f"{module.stem}.{os.getpid()}.so"
        _run([compiler, "-shared", *map(str, objects), "-ldl", "-o", str(scratch)])
        scratch.replace(module)
    _prune(cache, keep=[*objects, module])
    return module


def _prune(cache: Path, keep: list[Path], days: int = 3) -> None:
    """Removes what no build has used for some days."""
    for path in keep:
        path.touch()
    for path in cache.glob("*.*o"):
        if time.time() - path.stat().st_mtime > days * 86400:
            path.unlink(missing_ok=True)


@functools.cache
def load(more: tuple[Path, ...] = ()) -> ModuleType:
    """The built module, with kernels that ``more`` C++ files register.

    Raises Missing without a host C++ compiler, pybind11 or Python's headers.
    """
    import fcntl  # not on every system, which may yet report results

    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise Missing("no host C++ compiler (g++ or clang++, or CXX)")
    include = _pybind11_include()
    if include is None or not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise Missing("no pybind11 or Python headers")
    sources = sorted([*CSRC.glob("emulation/*.cpp"), *more])
    with open(_cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several processes builds
        path = build(sources, compiler, include)
    spec = importlib.util.spec_from_file_location("dbp_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(module: ModuleType, kernel: str, /, **arguments: Any) -> list[dict]:
    """The launches a call would make (kernel, grid, block, shared_bytes, params), none of them run."""
    code = module.call(kernel, 0, SHARED_LIMIT, 90, "", True, **arguments)
    if code:
        raise LaunchError(kernel, code)
    return module.launches()
