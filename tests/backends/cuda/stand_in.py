"""The emulation in the GPU's place: the whole cuda backend on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from emulation import call

import dbp_kernels as dbp
from dbp_kernels.backends.cuda import library


def array(t: torch.Tensor) -> np.ndarray:
    """The memory from a tensor's first to its last element, without a copy; bf16 as its bits."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
    flat = t.detach().as_strided((extent,), (1,))
    return (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()


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
