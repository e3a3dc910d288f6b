"""The compiled library: where it is, when it can be used, and the one place kernels start from.

Its ops are ``torch.ops.dbp_cuda.*``: one per kernel launcher, writing into tensors they are given. It
is loaded when a CUDA device is there, so that the same wheel works under a CPU-only torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.backends.prepared import forget

LIBRARY = Path(__file__).with_name("libdbp_cuda.so")

# A stand-in for the GPU: called with a kernel's name and arguments, it writes the results.
Simulator = Callable[[str, dict[str, Any]], None]
_simulator: Simulator | None = None
_simulated_multiprocessors = 4


def simulate(simulator: Simulator | None, multiprocessors: int = 4) -> None:
    """From now on launches go to ``simulator`` and the backend takes CPU tensors; None ends it.

    ``multiprocessors`` are few, where every block is run one after the other.
    """
    global _simulator, _simulated_multiprocessors
    _simulator, _simulated_multiprocessors = simulator, multiprocessors
    forget()


def simulated() -> bool:
    """Whether a simulator stands in for the GPU."""
    return _simulator is not None


@lru_cache
def build_text() -> str | None:
    """E.g. "nvcc 13.0, targets 8.0 9.0a", read from the file without loading it; None: no library."""
    if not LIBRARY.is_file():
        return None
    found = re.search(rb"dbp_cuda build: ([^\0]+)\0", LIBRARY.read_bytes())
    return found[1].decode() if found else "of unknown origin"


@lru_cache
def load() -> str | None:
    """Loads the library, once. None, or why it does not load."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the cuda library does not load: {error}"
    return None


@lru_cache
def _device_problem(device: int) -> str | None:
    problem = torch.ops.dbp_cuda.device_problem(device)
    return f"the cuda library does not run on cuda:{device}: {problem}" if problem else None


def unusable(device_type: str) -> str | None:
    """None if the kernels can run on tensors of this device type, else why not, in one sentence."""
    if simulated():
        return None
    if build_text() is None:
        return "the cuda kernels were not built (nvcc, ninja and --no-build-isolation are needed)"
    if device_type != "cuda":
        return f"the cuda backend runs on CUDA tensors, not on {device_type}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the cuda backend needs an NVIDIA GPU and none is available"
    return load() or _device_problem(torch.cuda.current_device())


def sm90_problem(device: torch.device | None = None) -> str | None:
    """None if the kernels for compute capability 9.0 run on a GPU (None: the current one), else why not."""
    if simulated() or not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} has another compute capability"
    if "9.0a" not in (build_text() or ""):
        return "the library was not built for 9.0a"
    return None


def multiprocessors(device: torch.device) -> int:
    """Of this GPU, or of what stands in for it."""
    return _multiprocessors(device) if device.type == "cuda" else _simulated_multiprocessors


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: str, /, **arguments: Any) -> None:
    """Runs one kernel on its tensors' device and current stream; asynchronous.

    Raises RuntimeError naming the kernel and its tensors if they do not fit it or it cannot start.
    """
    if _simulator is not None:
        _simulator(kernel, arguments)
    else:
        _op(kernel)(**arguments)


@lru_cache
def _op(kernel: str) -> Callable[..., None]:
    # which overload is not asked at every call
    op: Callable[..., None] = getattr(torch.ops.dbp_cuda, kernel).default
    return op
