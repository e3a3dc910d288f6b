"""``python -m bench host-time``: what Python takes for one call, with every launch stubbed.

No GPU is needed: the kernels' arguments are worked out on CPU tensors, and where a kernel would start
nothing happens. The backend "triton jit" stubs Triton's driver instead, so that Triton's own part of a
launch counts too. CPU time of one thread, medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.core import machine, registry
from bench.core.results import save
from bench.core.suite import Settings, Suite
from bench.core.table import format_table
from bench.suites.kernels import make_input
from dbp_kernels.tools import timing

BAR = 50  # us, of one patch_gram call
BACKENDS = ("cuda", "triton", "triton jit")
CASES = r"^(3x3 (64@56|256@14|512@7)|1x1 256@14|7x7 s2 3@224|linear (512|4096)) "
BATCH, PAIRS, TARGET = 26, 15, 90


class StubDriver:
    """Triton's driver without a GPU: kernels are compiled for one, and starting one calls ``start``.

    ``start(name, grid, arguments)``. Triton keeps what it compiled by device: this one is no GPU's.
    """

    def __init__(self, start: Callable[[str, tuple, tuple], object], target: int = TARGET):
        self.start, self._target = start, target
        self.utils = self

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._target, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads of a block

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.runtime import driver

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # after stream, function, metadata twice and two hooks; of whichever stub is there now
            driver.active.start(metadata.name, (x, y, z), rest[6:])

        return launch


@contextmanager
def stub_driver(start: Callable[[str, tuple, tuple], object]) -> Iterator[None]:
    """Within it Triton's kernels take CPU tensors, are compiled, and call ``start`` of StubDriver."""
    from triton.runtime import driver

    from dbp_kernels.backends.triton import runtime

    before = driver._active
    driver.set_active(StubDriver(start))
    runtime.simulate(runtime.Simulator(TARGET, None))
    try:
        yield
    finally:
        runtime.simulate(None)
        driver.set_active(before)


@contextmanager
def stubbed(backend: str, started: Callable[[str], object]) -> Iterator[None]:
    """Within it the backend takes CPU tensors, and calls ``started(kernel)`` where one would start."""
    import dbp_kernels as dbp
    from dbp_kernels.backends.cuda import library
    from dbp_kernels.backends.triton import runtime

    name, _, jit = backend.partition(" ")
    if name == "cuda":
        library.simulate(lambda kernel, arguments: started(kernel))
    elif not jit:
        launch = lambda kernel, *rest: started(kernel.__name__)  # noqa: E731
        runtime.simulate(runtime.Simulator(TARGET, launch))
    with stub_driver(lambda kernel, *rest: started(kernel)) if jit else nullcontext():
        try:
            with dbp.backend(name):
                yield
        finally:
            library.simulate(None)
            runtime.simulate(None)


def measure(backend: str, case: registry.Case, pairs: int = PAIRS) -> dict:
    """The record of one case: us of the backend's function, of the torch op, of the public function.

    Part of the two last is "dispatcher", a torch op with the same schema that does nothing. Part of
    all is "memory", the workspace and the result: large ones are dear on a CPU, not with torch's CUDA
    allocator, so the bar is for a call without it.
    """
    import dbp_kernels as dbp
    from dbp_kernels import backends, choose
    from dbp_kernels.ops import geometry_of

    x = make_input(case, Settings(dtype=torch.bfloat16, channels_last=True))
    geometry = geometry_of(x, *case.window)
    launched: list[str] = []
    with stubbed(backend, launched.append):
        module = backends.select("cpu")
        choice = choose.gram(x, geometry, backend)
        gram = module._gram(x, geometry, choice)
        module.patch_gram(x, geometry, choice)
    if not launched:
        raise RuntimeError(f"{backend}, {case.name}: the planner took no kernel of this backend")

    def memory() -> tuple[Tensor, Tensor]:
        return tuple(torch.empty(n, dtype=torch.float32) for n in (gram.workspace, gram.shape))

    calls = {
        "function": lambda: module.patch_gram(x, geometry, choice),
        "op": lambda: torch.ops.dbp.patch_gram(x, *case.window),
        "public": lambda: dbp.patch_gram(x, *case.window),
        "dispatcher": lambda: _no_op(x, *case.window),
        "memory": memory,
    }
    with stubbed(backend, lambda kernel: None), timing.cpu_time(), torch.no_grad():
        spreads = timing.time_interleaved(calls, pairs)
    return {
        "backend": backend,
        "case": case.name,
        "launched": launched,
        "us": {name: round(1e6 * spread.median, 2) for name, spread in spreads.items()},
    }


_lib = torch.library.Library("dbp_bench", "DEF")
_lib.define(
    "nothing(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor"
)
_lib.impl("nothing", lambda keyset, x, *rest: x, "Autograd", with_keyset=True)


def _no_op(*arguments: Any) -> Tensor:
    return torch.ops.dbp_bench.nothing(*arguments)


def table(records: Sequence[dict]) -> str:
    """The records as Markdown."""
    columns = list(records[0]["us"])
    head = ["backend", "case", "launches", *(f"{name} (us)" for name in columns)]
    rows = [
        [r["backend"], r["case"], str(len(r["launched"])), *(f"{r['us'][c]:.1f}" for c in columns)]
        for r in records
    ]
    return format_table([head, *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (1: a call above the bar)."""
    from dbp_kernels.tools.arguments import positive

    out = argparse.ArgumentParser(prog="python -m bench host-time", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--backend", choices=BACKENDS, action="append", help="default: all")
    out.add_argument("--filter", default=CASES, metavar="REGEX", help="cases of the registry")
    out.add_argument("--pairs", type=positive, default=PAIRS, help=f"rounds (default: {PAIRS})")
    out.add_argument("--save", type=Path, metavar="PATH", help="write the result, as JSON")
    options = out.parse_args(arguments)
    if options.save and options.save.exists():
        print(f"{options.save} exists and is not overwritten", file=sys.stderr)
        return 2
    try:
        with timing.threads(1):
            records = [
                measure(backend, case, options.pairs)
                for backend in options.backend or BACKENDS
                for case in registry.select(options.filter, BATCH)
            ]
    except RuntimeError as error:  # no Triton, or one that interprets
        print(error, file=sys.stderr)
        return 2
    if not records:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    print(table(records))
    if options.save:
        result = {
            "format": 1,
            "command": "python -m bench host-time",
            "machine": machine.describe("cpu"),
            "settings": {"device": "cpu", "dtype": "bfloat16"},
            "bar_us": BAR,
            "host_time": records,
        }
        save(result, options.save)
        print(f"saved {options.save}")
    slow = [r for r in records if r["us"]["public"] - r["us"]["memory"] > BAR]
    return 1 if slow else 0


SUITE = Suite("Python's part of one call of patch_gram", table)
