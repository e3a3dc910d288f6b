"""Builds csrc/emulation (with every kernel registered there and in tests/backends/cuda) and calls it.

``call("pack", seed=0, x=..., out=..., n=...)`` runs a kernel's launcher under emulation on numpy
arrays (bf16 as uint16, see ``bf16``), which are changed in place as on a device. ``run_ptx`` runs the
same launch from the PTX that nvcc makes of the same source.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from build_folder import build_folder

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
SHARED_LIMIT = 227 * 1024  # bytes per block on sm_90; 99 KB on sm_86, 89 and 120, 163 on sm_80
DTYPES = {"fp32": 0, "tf32": 1, "fp16": 2, "bf16": 3}  # enum class DType

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
def load() -> ModuleType:
    """The built module; skips the test where it cannot be built for want of a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no host C++ compiler (g++ or clang++, or CXX)")
    include = _pybind11_include()
    if include is None or not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        pytest.skip("no pybind11 or Python headers")
    sources = sorted([*CSRC.glob("emulation/*.cpp"), *Path(__file__).parent.glob("*.cpp")])
    with open(_cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds
        path = build(sources, compiler, include)
    spec = importlib.util.spec_from_file_location("dbp_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LaunchError(RuntimeError):
    """A launcher returned a CUDA error: ``code`` is its number."""

    def __init__(self, kernel: str, code: int):
        super().__init__(f"{kernel}: CUDA error {code}")
        self.code = code


def call(
    kernel: str,
    /,
    seed: int = 0,
    shared_limit: int = SHARED_LIMIT,
    capability: int = 90,
    leave_out: str = "",
    **arguments,
) -> dict:
    """Runs a registered kernel under emulation; returns what the emulation counted.

    ``capability``: of the device that is emulated, 90 for 9.0.
    ``leave_out`` names a barrier or wait to ignore, one of the ``sites`` of the result:
    "pack.cuh:58".
    """
    module = load()
    code = module.call(kernel, seed, shared_limit, capability, leave_out, False, **arguments)
    if code:
        raise LaunchError(kernel, code)
    return module.stats()


def unneeded(kernel: str, /, seeds: Iterable[int] = range(3), **arguments) -> list[str]:
    """Lines of the kernel with a barrier or wait whose absence raises no fault in any schedule."""
    module = load()
    sites = call(kernel, **arguments)["sites"]
    assert sites, f"{kernel} has no barrier and no wait"

    def caught(site: str, seed: int) -> bool:
        try:
            call(kernel, seed=seed, leave_out=site, **arguments)
        except module.Fault:
            return True
        return False

    return [site for site in sites if not any(caught(site, seed) for seed in seeds)]


def record(kernel: str, /, **arguments) -> list[dict]:
    """The launches a call would make (kernel, grid, block, shared_bytes, params), none of them run."""
    module = load()
    code = module.call(kernel, 0, SHARED_LIMIT, 90, "", True, **arguments)
    if code:
        raise LaunchError(kernel, code)
    return module.launches()


@functools.cache
def ptx(header: str, arch: str, defines: tuple[str, ...] = ()):
    """The kernels that the launchers of csrc/kernels/``header`` can choose, compiled and loaded."""
    ptxsim = pytest.importorskip("ptxsim", reason="no PTX simulator")
    compiler = pytest.importorskip("ptxsim.cuda")

    nvcc = os.environ.get("NVCC", "nvcc")
    if shutil.which(nvcc) is None:
        pytest.skip("no nvcc")
    # Where the simulator never schedules single warps (blocks of more than 8, unless told to), one
    # that spins on an mbarrier can keep its neighbour from ever running: a deadlock of its own.
    importlib.import_module("ptxsim.executor").MAX_SPLIT = 5
    source = f'#include "{header}"\n'
    text = compiler.compile(
        source,
        arch=arch,
        include_dirs=[str(CSRC / "kernels"), str(Path(__file__).parent)],
        defines=defines,
    )
    # As on sm_90, the dynamic shared memory does not begin at address 0.
    reserved = ".shared .align 1024 .b8 reserved[1024];\n"
    return ptxsim.load(text.replace(".extern .shared", reserved + ".extern .shared", 1))


def run_ptx(
    kernel: str,
    /,
    header: str,
    arch: str = "compute_80",
    seed: int = 0,
    race_check: bool = True,
    defines: tuple[str, ...] = (),
    **arguments,
) -> None:
    """The same call as ``call``, by the compiled PTX. The launcher chooses kernel, grid and block."""
    module = ptx(header, arch, defines)
    from ptxsim import GlobalMemory

    memory = GlobalMemory()
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    addresses = {k: memory.address(v) if v.size else 256 for k, v in arrays.items()}
    maps = []  # the simulator only remembers those that someone holds
    for launch in record(kernel, **{**arguments, **addresses}):
        params = _with_tensor_maps(launch["params"], addresses, arrays, maps)
        module.launch(
            launch["kernel"],
            launch["grid"],
            launch["block"],
            [params],
            shared_bytes=launch["shared_bytes"],
            seed=seed,
            race_check=race_check,
            memory=memory,
        )


def _with_tensor_maps(params: bytes, addresses: dict, arrays: dict, keep: list) -> bytes:
    """A recorded parameter struct, its tensor maps (emulation/sm90.h) replaced by the simulator's."""
    from ptxsim import TensorMap

    at = -1
    while (at := params.find(b"dbpTmap\0", at + 1)) >= 0:
        base, *fields = struct.unpack_from("<Q5q4q5i3B", params, at + 8)
        size, stride, box = fields[:5], fields[5:9], fields[9:14]
        rank, element, swizzle = fields[14:]
        name = next(k for k, v in arrays.items() if addresses[k] <= base < addresses[k] + v.nbytes)
        shape = size[:rank][::-1]
        dense = [element * math.prod(size[: d + 1]) for d in range(rank - 1)]
        assert stride[: rank - 1] == dense, "the simulator's tensor maps are of contiguous arrays"
        start = (base - addresses[name]) // element
        tensor = arrays[name].reshape(-1)[start : start + math.prod(shape)].reshape(shape)
        keep.append(TensorMap(tensor, tuple(box[:rank][::-1]), swizzle))
        params = params[:at] + keep[-1].to_bytes() + params[at + 128 :]
    return params


# --- numpy has no bf16 ----------------------------------------------------------------------------


def bf16(x: np.ndarray) -> np.ndarray:
    """float -> bf16 bits (uint16), rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Values as the device stores them: float32, float16 or bf16 bits."""
    if dtype == "bf16":
        return bf16(x)
    return np.ascontiguousarray(x, np.float16 if dtype == "fp16" else np.float32)


def decode(x: np.ndarray) -> np.ndarray:
    """Stored values as float64."""
    return (from_bf16(x) if x.dtype == np.uint16 else x).astype(np.float64)
