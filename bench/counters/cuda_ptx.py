"""Launches of the CUDA C++ kernels in the PTX simulator: nvcc's PTX, the launchers' own arguments."""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bench.counters import emulation
from bench.counters.emulation import CSRC, Missing


def simulator() -> ModuleType:
    """The package ``ptxsim``. Raises Missing without it."""
    try:
        return importlib.import_module("ptxsim")
    except ModuleNotFoundError:
        raise Missing(
            "the PTX simulator is not installed: no package ptxsim on PYTHONPATH"
        ) from None


def nvcc() -> None:
    """Raises Missing without the compiler."""
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        raise Missing("nvcc was not found (on PATH, or NVCC)")


@functools.cache
def text(header: str, arch: str, defines: tuple[str, ...] = (), folder: Path | None = None) -> str:
    """PTX of the kernels that the launchers of csrc/kernels/``header`` (or ``folder``'s) can choose.

    Raises Missing without the simulator or nvcc.
    """
    simulator()
    nvcc()
    folders = [CSRC / "kernels", *([folder] if folder else [])]
    return importlib.import_module("ptxsim.cuda").compile(
        f'#include "{header}"\n', arch=arch, include_dirs=list(map(str, folders)), defines=defines
    )


@functools.cache
def module(
    header: str,
    arch: str,
    defines: tuple[str, ...] = (),
    folder: Path | None = None,
    reserved: int = 1024,
) -> Any:
    """The same, loaded into the simulator.

    ``reserved`` bytes of shared memory lie before the dynamic part, as on sm_90.
    """
    found = text(header, arch, defines, folder)
    # Where the simulator never schedules single warps (blocks of more than 8, unless told to), one
    # that spins on an mbarrier can keep its neighbour from ever running: a deadlock of its own.
    importlib.import_module("ptxsim.executor").MAX_SPLIT = 5
    if reserved:
        line = f".shared .align 1024 .b8 reserved[{reserved}];\n"
        found = found.replace(".extern .shared", line + ".extern .shared", 1)
    return simulator().load(found)


def only(kernel: str, found: str) -> str:
    """PTX without the other kernels."""
    head, *entries = re.split(r"^(?=\.(?:visible|weak) \.entry )", found, flags=re.M)
    return head + "".join(entry for entry in entries if re.match(rf"\S+ \S+ {kernel}\(", entry))


@functools.cache
def registers(header: str, arch: str, kernel: str) -> int:
    """Of a thread, by ptxas; ``kernel`` is its mangled name."""
    found = only(kernel, text(header, arch))
    return importlib.import_module("ptxsim.cuda").resources(found)[kernel]["registers"]


def kernel_name(mangled: str) -> str:
    """The function's name without its suffix: "gram_shift" of dbp::gram_shift_kernel<...>."""
    for number in re.finditer(r"\d+", mangled):
        name = mangled[number.end() : number.end() + int(number[0])]
        if name.endswith("_kernel"):
            return name.removesuffix("_kernel")
    return mangled


def array(t: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first to its last element, without a copy; bf16 as its bits."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
    flat = t.detach().as_strided((extent,), (1,))
    return (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, its pointers and tensor maps in the simulator's ``memory``."""

    kernel: str  # mangled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    shared_bytes: int
    memory: Any
    maps: tuple[Any, ...]  # the simulator only remembers those that someone holds
    module: Callable[[], Any]  # which holds the kernel; compiled only if it is run

    def run(self, **options: Any) -> Any:
        """Runs it; returns the simulator's statistics."""
        return self.module().launch(
            self.kernel,
            self.grid,
            self.block,
            [self.params],
            shared_bytes=self.shared_bytes,
            memory=self.memory,
            **options,
        )


def launches(
    emulated: ModuleType, kernel: str, arguments: Mapping[str, Any], module: Callable[[], Any]
) -> Iterator[Launch]:
    """What the launcher starts for these arguments, arrays among them. ``module``: of its kernels."""
    memory = simulator().GlobalMemory()
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    addresses = {k: memory.address(v) if v.size else 256 for k, v in arrays.items()}
    for launch in emulation.record(emulated, kernel, **{**arguments, **addresses}):
        params, maps = _with_tensor_maps(launch["params"], addresses, arrays)
        yield Launch(
            launch["kernel"],
            launch["grid"],
            launch["block"],
            params,
            launch["shared_bytes"],
            memory,
            maps,
            module,
        )


def _with_tensor_maps(
    params: bytes, addresses: Mapping[str, int], arrays: Mapping[str, np.ndarray]
) -> tuple[bytes, tuple[Any, ...]]:
    """A recorded parameter struct, its tensor maps (emulation/sm90.h) replaced by the simulator's."""
    at, maps = -1, []
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
        maps.append(simulator().TensorMap(tensor, tuple(box[:rank][::-1]), swizzle))
        params = params[:at] + maps[-1].to_bytes() + params[at + 128 :]
    return params, tuple(maps)
