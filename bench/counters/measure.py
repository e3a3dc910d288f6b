"""Launches of a backend, simulated for a few blocks each: their counts, and bounds on their time.

The backend's own Python plans every launch for the real GPU's multiprocessors; what stands in for the
GPU runs some blocks of the real grid, and they stand for all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from bench.core.suite import failed
from bench.counters import cuda_ptx, emulation, triton_ptx
from bench.counters.cuda_ptx import simulator

GPUS = {80: "A100", 90: "H100", 89: "RTX 4090"}
_NAMES = {80: "sm_80", 90: "sm_90a", 89: "sm_89"}
# Warp instructions that are simulated of a launch, in whole blocks. Those of matrix products are much
# alike; of a reduction some blocks have nothing to do, and many are looked at.
PRODUCTS, OTHERS, FEWEST, MOST = 600_000, 1_500_000, 3, 400
_STEPS = 20_000_000  # of a launch, until it counts as one that does not end
_WRITES = ("st.global", "tma.store", "atomic")


class Launch(Protocol):
    """A launch in the simulator."""

    @property
    def grid(self) -> tuple[int, ...]: ...

    def run(self, **options: Any) -> Any: ...


# (kernel, configuration, what makes the launch and says how many registers a thread has)
Started = Callable[[str, str, Callable[[], tuple[Launch, int]]], object]


def multiprocessors(target: int) -> int:
    """Of the GPU that stands for a compute capability."""
    return simulator().TARGETS[_NAMES[target]].sms


@contextmanager
def stand_in(backend: str, target: int, started: Started) -> Iterator[None]:
    """Within it the backend takes CPU tensors, and calls ``started`` where a kernel would start."""
    from dbp_kernels.backends.cuda import library
    from dbp_kernels.backends.triton import runtime

    if backend == "cuda":
        library.simulate(_cuda(target, started), multiprocessors(target))
    else:
        stub = runtime.Simulator(target, _triton(target, started), multiprocessors(target))
        runtime.simulate(stub)
    try:
        yield
    finally:
        library.simulate(None)
        runtime.simulate(None)


def _cuda(target: int, started: Started) -> Callable[[str, dict[str, Any]], None]:
    arch = _NAMES[target].replace("sm", "compute")

    def launch(launcher: str, arguments: dict[str, Any]) -> None:
        arrays = {k: cuda_ptx.array(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        config = f"tile {arguments['block']}" if "block" in arguments else ""
        code = f"{launcher}.cuh", arch
        module = partial(cuda_ptx.module, *code, reserved=0)
        for found in cuda_ptx.launches(emulation.load(), launcher, arrays, module):

            def make(found: cuda_ptx.Launch = found) -> tuple[Launch, int]:
                return found, cuda_ptx.registers(*code, found.kernel)

            started(cuda_ptx.kernel_name(found.kernel), config, make)

    return launch


def _triton(target: int, started: Started) -> Callable[..., None]:
    def launch(
        kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *options: int
    ) -> None:
        sides = [v for name, v in arguments.items() if name.startswith(("BLOCK", "SQUARE"))]
        config = f"{'x'.join(map(str, sides))} w{options[0]} s{options[1]}"

        def make() -> tuple[Launch, int]:
            found = triton_ptx.launch(kernel, grid, arguments, *options, target)
            return found, triton_ptx.resources(found.cubin)["REG"]

        started(kernel.fn.__name__.removesuffix("_kernel"), config, make)

    return launch


# --------------------------------------------------------------------------- one launch


def spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` blocks, one anywhere in each part: at even distances plans repeat."""
    count, chance = min(count, total), random.Random(0)
    ends = [part * total // count for part in range(count + 1)]
    return [chance.randrange(first, last) for first, last in pairwise(ends)]


def record(make: Callable[[], tuple[Launch, int]], target: int) -> dict:
    """Counts and bounds of a launch, or why there are none."""
    try:
        launch, registers = make()
        return {"status": "ok", **describe(profile(launch), target, registers)}
    except emulation.Missing:
        raise
    except Exception as failure:
        return failed(failure)


def profile(launch: Launch) -> Any:
    """The simulator's profile of some blocks."""
    total = math.prod(launch.grid)

    def run(count: int) -> Any:
        blocks = spread(total, count)
        return launch.run(blocks=blocks, profile=True, lockstep=True, max_steps=_STEPS).profile

    first = run(FEWEST)
    budget = PRODUCTS if first.total.mma_instructions else OTHERS
    count = len(first.blocks) * budget // max(1, first.total.warp_instructions)
    count = min(total, MOST, count)
    return run(count) if count > len(first.blocks) else first


def describe(profile: Any, target: int, registers: int) -> dict:
    """What is written down of a profile; of the whole grid, where it says nothing else.

    ``wavefronts``, ``sectors``: as multiples of the fewest. ``loop_*``: of the main loop alone.
    Megabytes are those of sectors, ``once_mb`` of different ones.
    """
    counts, estimate = profile.total, simulator().estimate(profile, _NAMES[target], registers)
    moved = {"read_mb": 0.0, "written_mb": 0.0}
    for name, traffic in counts.global_.items():
        moved["written_mb" if name in _WRITES else "read_mb"] += 32e-6 * traffic.sectors
    once = profile.read_bytes + profile.write_bytes
    once = min(once * estimate.scale, max(once, profile.touched_bytes))
    lines = main_loop(profile.lines)
    return {
        "grid": math.prod(profile.grid),
        "simulated": len(profile.blocks),
        "threads": profile.threads,
        "registers": registers,
        "shared_bytes": profile.shared_bytes,
        "instructions": _short(counts.warp_instructions * estimate.scale),
        "gflop": _short(1e-9 * estimate.flops),
        "instructions_per_mma": _short(counts.instructions_per_mma),
        "loop_instructions_per_mma": _short(instructions_per_mma(lines)),
        "wavefronts": _short(wavefronts(profile.lines)),
        "loop_wavefronts": _short(wavefronts(lines)),
        "sectors": _short(counts.sectors_ratio),
        **{name: _short(mb * estimate.scale) for name, mb in moved.items()},
        "once_mb": _short(1e-6 * once),
        "us": _short(1e6 * estimate.time),
        "binding": estimate.binding,
        "fraction": _short(estimate.fraction),
        "bounds_us": {name: _short(1e6 * time) for name, time in estimate.bounds.items()},
        "resident": estimate.occupancy.blocks,
        "waves": _short(estimate.waves),
    }


def main_loop(lines: list[Any]) -> list[Any]:
    """Lines that are executed at least half as often as the busiest product, or line without any."""
    most = max((x.issued for x in _products(lines) or lines), default=0)
    return [x for x in lines if 2 * x.issued >= most]


def _products(lines: list[Any]) -> list[Any]:
    return [x for x in lines if x.kind in ("mma", "wgmma")]


def instructions_per_mma(lines: list[Any]) -> float | None:
    """Of warps, as the simulator counts them."""
    products = sum(x.issued for x in _products(lines))
    return sum(x.issued for x in lines) / products if products else None


def wavefronts(lines: list[Any]) -> float | None:
    """Those of threads' accesses to shared memory, as a multiple of what they need without conflicts."""
    requests = sum(x.traffic.requests for x in lines)
    return sum(x.traffic.wavefronts for x in lines) / requests if requests else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def key(row: Mapping[str, Any]) -> str:
    """What identifies a row in results and limits."""
    names = ("backend", "kernel", "precision", "config", "problem")
    return " ".join([*filter(None, (row[name] for name in names)), f"sm_{row['target']}"])
