"""Compiles shipped kernels ahead of time (in the child process of ``compiled``)."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import lru_cache

import dbp_kernels.backends.triton as package
from bench.counters.triton_ptx import compile_kernel, resources


@dataclass(frozen=True)
class Code:
    """What the compiler made of one case: bytes of stack (spills) and shared memory, instructions."""

    name: str
    stack: int
    registers: int
    shared: int
    tensor_cores: bool  # whether the case wants them
    wgmma: bool
    mma: bool


@lru_cache
def kernel_modules() -> tuple[str, ...]:
    """Names of the backend's modules that ship kernels."""
    names = [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
    return tuple(n for n in names if hasattr(importlib.import_module(n), "cases"))


def kernels_of(module: str) -> set[str]:
    """The module's kernels, by their names: those that end in ``_kernel``."""
    return {name for name in vars(importlib.import_module(module)) if name.endswith("_kernel")}


def compile_cases(module: str, target: int, part: int, parts: int) -> list[Code]:
    """Every ``parts``-th case of a module for a target, each with and without divisible integers."""
    out = []
    for case in importlib.import_module(module).cases(target)[part::parts]:
        integers = tuple(n for n in case.divisible if case.signature[n][0] == "i")
        variants = [(), integers] if integers else [()]
        out += [compile_case(case, target, divisible) for divisible in variants]
    return out


def compile_case(case, target: int, divisible: tuple[str, ...] = ()) -> Code:
    """Compiles one KernelCase for a compute capability."""
    aligned = {n for n, t in case.signature.items() if t.startswith("*")} | set(divisible)
    options = case.num_warps, case.num_stages, target
    kernel = compile_kernel(case.kernel, case.signature, case.constexprs, aligned, *options)
    ptx = kernel.asm["ptx"]
    usage = resources(kernel.asm["cubin"])
    return Code(
        name=case.name + " divisible" * bool(divisible),
        stack=usage["STACK"] + usage["LOCAL"],
        registers=usage["REG"],
        shared=kernel.metadata.shared,
        tensor_cores=case.tensor_cores,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
    )
