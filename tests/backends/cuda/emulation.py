"""Builds csrc/emulation (with every kernel registered there and in tests/backends/cuda) and calls it.

``call("pack", seed=0, x=..., out=..., n=...)`` runs a kernel's launcher under emulation on numpy
arrays (bf16 as uint16, see ``bf16``), which are changed in place as on a device. ``run_ptx`` runs the
same launch from the PTX that nvcc makes of the same source.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bench.counters import cuda_ptx, emulation
from bench.counters.emulation import CSRC as CSRC
from bench.counters.emulation import SHARED_LIMIT, LaunchError

DTYPES = {"fp32": 0, "tf32": 1, "fp16": 2, "bf16": 3}  # enum class DType
HERE = Path(__file__).parent


@functools.cache
def load() -> ModuleType:
    """The built module; skips the test where it cannot be built for want of a compiler."""
    try:
        return emulation.load(tuple(sorted(HERE.glob("*.cpp"))))
    except emulation.Missing as missing:
        pytest.skip(str(missing))


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
    return emulation.record(load(), kernel, **arguments)


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
    try:
        module = cuda_ptx.module(header, arch, defines, HERE)
    except emulation.Missing as missing:
        pytest.skip(str(missing))
    for launch in cuda_ptx.launches(load(), kernel, arguments, lambda: module):
        launch.run(seed=seed, race_check=race_check)


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
