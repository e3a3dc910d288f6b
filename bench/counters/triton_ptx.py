"""Launches of the Triton kernels in the PTX simulator: compiled ahead of time as the JIT would."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from bench.counters.cuda_ptx import simulator
from dbp_kernels.backends.triton import runtime


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    divisible: Iterable[str],
    num_warps: int,
    num_stages: int,
    target: int,
) -> Any:
    """Triton's compiled kernel for a compute capability; ``divisible`` arguments are so by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs=dict(constexprs),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **runtime.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """ "REG", "STACK" and "LOCAL" of the machine code's one kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@dataclass(frozen=True)
class Launch:
    """One launch: the code, loaded into the simulator, and its arguments in the simulator's form."""

    code: Any
    cubin: bytes
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    @property
    def descriptors(self) -> bool:
        """Whether tensor descriptors are among the arguments."""
        return any(hasattr(argument, "signature") for argument in self.arguments)

    def run(self, **options: Any) -> Any:
        """Runs it; returns the simulator's statistics."""
        return self.code.launch(self.grid, self.arguments, **options)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    target: int,
) -> Launch:
    """What ``runtime.Launch`` would start, compiled for ``target``."""
    simulator()
    constexprs, signature, divisible, values = {}, {}, [], []
    for parameter in kernel.params:
        name = parameter.name
        value = arguments.get(name, parameter.default)
        # the JIT turns the integer 1 into a constant, unless told otherwise
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one or value is None:
            constexprs[name] = value
            continue
        values.append(_in_simulator(value))
        signature[name] = parameter.annotation_type or _type_of(values[-1])
        if _divisible(value) and not parameter.do_not_specialize:
            divisible.append(name)
    options = num_warps, num_stages, target
    types, constants = tuple(signature.items()), tuple(constexprs.items())
    code, cubin = _code(kernel, types, constants, tuple(divisible), *options)
    return Launch(code, cubin, grid, tuple(values))


@lru_cache(maxsize=256)
def _code(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constexprs: tuple[tuple[str, Any], ...],
    divisible: tuple[str, ...],
    *options: int,
) -> tuple[Any, bytes]:
    import ptxsim.triton

    compiled = compile_kernel(kernel, dict(signature), dict(constexprs), divisible, *options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    code = ptxsim.triton.Compiled(simulator().load(ptx), metadata.name, ptx, metadata)
    return code, compiled.asm["cubin"]


def _in_simulator(value: Any) -> Any:
    """Descriptors and strided tensors in the simulator's form; everything else as it is."""
    if isinstance(value, torch.Tensor) and not value.is_contiguous():
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
        return value.as_strided((reach + 1,), (1,))  # all that kernels may touch
    if not hasattr(value, "block_shape"):
        return value
    import ptxsim.triton

    array = value.base.as_strided(value.shape, value.strides)
    element = runtime.element(array.dtype)
    return ptxsim.triton.Descriptor(array, tuple(value.block_shape), element)


def _type_of(value: Any) -> str:
    import ptxsim.triton

    return ptxsim.triton.type_of(value)


def _divisible(value: Any) -> bool:
    """Whether the JIT would compile for an address or an integer that is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0
