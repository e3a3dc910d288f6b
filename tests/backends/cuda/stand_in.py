"""The emulation in the GPU's place: the whole cuda backend on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from emulation import call

import dbp_kernels as dbp
from bench.counters.cuda_ptx import array
from dbp_kernels.backends.cuda import library


@contextmanager
def emulated(seed: int = 0) -> Iterator[list[str]]:
    """Within it ``dbp.backend("cuda")`` is active and emulated; gives the names of what is launched."""
    launched: list[str] = []

    def launch(kernel: str, arguments: dict[str, Any]) -> None:
        arrays = {k: array(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        call(kernel, seed=seed + len(launched), **arrays)
        launched.append(kernel)

    library.simulate(launch)
    try:
        with dbp.backend("cuda"):
            yield launched
    finally:
        library.simulate(None)
