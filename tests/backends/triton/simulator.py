"""Runs the compiled PTX of every kernel launch on the CPU (in the child process of ``compiled``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.counters import triton_ptx
from dbp_kernels.backends.triton import runtime


@contextmanager
def simulated(target: int = 80, seed: int = 0, race_check: bool = True) -> Iterator[list[str]]:
    """Within it, kernels are compiled for ``target`` and simulated; yields the launched names.

    ``race_check`` understands whole-block barriers and cp.async, not the copies of tensor
    descriptors: kernels that take one are run without it.
    """
    launched: list[str] = []

    def launch(kernel, grid, arguments: dict[str, Any], *options: int) -> None:
        launched.append(kernel.fn.__name__)
        started = triton_ptx.launch(kernel, grid, arguments, *options, target)
        started.run(seed=seed + len(launched), race_check=race_check and not started.descriptors)

    runtime.simulate(runtime.Simulator(target, launch))
    try:
        yield launched
    finally:
        runtime.simulate(None)
