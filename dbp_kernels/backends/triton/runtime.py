"""What all kernel files share: where kernels run, how they are launched, what is shipped.

Importable without Triton, so that ``unusable`` can say that it is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.backends.prepared import forget
from dbp_kernels.backends.rows import aligned
from dbp_kernels.precision import tf32

# Triton reads this once, when it is imported: the kernels of a process are either all interpreted
# (on CPU tensors) or all compiled.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

TARGETS = (80, 86, 89, 90, 100, 120)  # compute capabilities the kernels are compiled for in tests
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
OPTIONS = {"enable_fp_fusion": True}  # of every compilation; Triton's default is about to change
_OLDEST_TRITON = (3, 6)
_ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class KernelCase:
    """One shipped compilation of a kernel: what ahead-of-time tests compile.

    Attributes:
        name: e.g. "gram_shift[bf16, 64x64x64]".
        kernel: the function under ``@triton.jit``.
        signature: type of every argument that is not a constexpr: "*bf16", "i32", "i64", "fp32",
            "tensordesc<bf16[64,64]>".
        constexprs: value of every constexpr argument.
        tensor_cores: the code for sm_90 must contain wgmma (bf16, fp16 and tf32 operands).
        divisible: integer arguments that often are multiples of 16, of which the JIT makes a variant
            of its own. Pointers always count as 16-byte aligned.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    divisible: Sequence[str] = ()


@dataclass(frozen=True)
class Simulator:
    """Stands in for the GPU: ``launch(kernel, grid, arguments, num_warps, num_stages)``.

    Without ``launch`` kernels start as on a GPU: for a driver of Triton's that stands in for it.
    ``multiprocessors`` are few, where every program is run one after the other.
    """

    target: int
    launch: Callable[[Any, tuple[int, ...], dict[str, Any], int, int], None] | None
    multiprocessors: int = 4


_simulator: Simulator | None = None


def simulate(simulator: Simulator | None) -> None:
    """From now on compiled kernels go to ``simulator`` and take CPU tensors; None ends it."""
    global _simulator
    _simulator = simulator
    forget()


def on_cpu() -> bool:
    """Whether kernels take CPU tensors here: interpreted or simulated."""
    return INTERPRET or _simulator is not None


class Launch:
    """A kernel, its grid and its arguments but for those that come first: tensors, given by calls.

    The one place kernels start from: on the tensors' device, on its current stream. An empty grid
    launches nothing. Triton takes 15 us and more to see which compiled variant the arguments want;
    here only tensors differ from call to call, so what it compiled is kept for such tensors.

    Args:
        fixed, constants: the arguments after the tensors, by position and by name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        *fixed: Any,
        num_warps: int,
        num_stages: int,
        **constants: Any,
    ):
        self._kernel, self._grid = kernel, tuple(grid)
        self._options = {"num_warps": num_warps, "num_stages": num_stages}
        names = kernel.arg_names
        count = len(names) - len(constants)
        self._tensors = names[: count - len(fixed)]
        self._fixed = (*fixed, *[constants[name] for name in names[count:]])
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, **tensors: Any) -> None:
        """Starts the kernel. A tensor may be None where the kernel says so, or a descriptor."""
        if 0 in self._grid:
            return
        arguments = [*[tensors[name] for name in self._tensors], *self._fixed]
        if _simulator is not None and _simulator.launch is not None:
            named = dict(zip(self._kernel.arg_names, arguments))
            _simulator.launch(self._kernel, self._grid, named, *self._options.values())
        elif INTERPRET:
            self._kernel[self._grid](*arguments, **self._options, **OPTIONS)
        else:
            self._start(arguments)

    def _start(self, arguments: list[Any]) -> None:
        given = [a for a in arguments[: len(self._tensors)] if isinstance(a, Tensor)]
        variant = tuple([(a.dtype, aligned(a)) for a in given])
        with torch.cuda.device_of(given[0]):
            start = self._compiled.get(variant)
            if start is not None:
                start(*arguments)
                return
            from triton.compiler import CompiledKernel

            compiled = self._kernel[self._grid](*arguments, **self._options, **OPTIONS)
            if isinstance(compiled, CompiledKernel):
                self._compiled[variant] = compiled[(*self._grid, 1, 1)[:3]]


def launch(
    kernel: Any, grid: Sequence[int], *args: Any, num_warps: int, num_stages: int, **kwargs: Any
) -> None:
    """A kernel that starts once: ``args`` and ``kwargs`` are its arguments, constexprs included."""
    tensors = dict(zip(kernel.arg_names, args))
    Launch(kernel, grid, num_warps=num_warps, num_stages=num_stages, **kwargs)(**tensors)


def unusable(device_type: str) -> str | None:
    """None if kernels can run on tensors of this device type, else the reason in one sentence."""
    reason = _no_triton()
    if reason or (on_cpu() and device_type == "cpu"):
        return reason
    if device_type != "cuda":
        return f"the triton backend runs on CUDA tensors, not on {device_type}"
    if torch.version.hip is not None:
        return "the triton backend is written for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "the triton backend needs a CUDA device and none is available"
    return _old_device(torch.cuda.current_device())


@lru_cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (3.6 or newer is needed)"
    try:
        version = importlib.metadata.version("triton")
        known = tuple(int(part) for part in version.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None  # a build of one's own
    if known < _OLDEST_TRITON:
        return f"triton {version} is installed and 3.6 or newer is needed"
    return None


@lru_cache
def _old_device(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the triton backend needs compute capability 8.0 and the device has {major}.{minor}"
    return None


def target(device: torch.device) -> int:
    """Compute capability as a number, e.g. 90. The interpreter counts as 90."""
    if _simulator is not None:
        return _simulator.target
    return 90 if INTERPRET else _target(torch.cuda._utils._get_device_index(device, True))


@lru_cache
def _target(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def sm_count(device: torch.device) -> int:
    """Multiprocessors to fill; few where every program is interpreted, one after the other."""
    if _simulator is not None:
        return _simulator.multiprocessors
    if INTERPRET:
        return 4
    return _sm_count(torch.cuda._utils._get_device_index(device, True))


@lru_cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def shared_limit(target: int) -> int:
    """Bytes of shared memory one block can have; the smallest of all for an unknown target."""
    return 1024 * _SHARED_KIB.get(target, 99)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot: float32 follows torch's own products."""
    if dtype == torch.float32 and tf32():
        return "tf32"
    return "ieee"


def element(dtype: torch.dtype) -> str:
    """Triton's name of a dtype. Raises KeyError for one that no kernel takes."""
    return _ELEMENTS[dtype]
