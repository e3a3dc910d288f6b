"""``python -m dbp_kernels tune``: times every shipped tile shape on this GPU and pins the fastest.

Writes backends/triton/configs/<gpu>.json within the package, which then uses it on this GPU and on
others of its compute capability; of an installed package the next version's files replace it. Nothing
is ever tuned while the package is in use: in a CUDA graph, say, a search would be recorded. Only
shipped shapes are candidates, so what is pinned is what the tests compile. The file is written anew
after every problem.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.precision import products_in
from dbp_kernels.tools import origin
from dbp_kernels.tools.cases import Case, conv, error, oracle, random_input, resnets, with_batch
from dbp_kernels.tools.timing import time_interleaved, time_replayed

FOLDER = origin.PACKAGE / "backends" / "triton" / "configs"


@dataclass(frozen=True)
class Problem:
    """One size of one kernel, in the terms ``configs.pinned`` is asked in.

    ``run(config)`` returns the result, ``exact`` computes it in float64.
    """

    kernel: str
    precision: str
    sizes: dict[str, int]
    candidates: tuple[Any, ...]
    run: Callable[[Any], torch.Tensor]
    exact: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a problem is made from; ``make(device)`` is None where the kernel is not for it."""

    kernel: str
    precision: str
    label: str
    make: Callable[[torch.device], Problem | None]

    @property
    def name(self) -> str:
        """E.g. "gram_shift bf16: 3x3 64@56 b26"."""
        return f"{self.kernel} {self.precision}: {self.label}"


PRECISIONS = {
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "ieee": torch.float32,
    "fp16": torch.float16,
}
_GRAMS = ("gram_shift", "gram_direct", "gram_shift_tma")  # modules of the Triton backend
PAIRS = 5
_DIMS, _GROUPS = (576, 1152, 2304, 256, 128, 64), (1, 4)
# Of products: groups, rows, columns, inner dimension. R S, and samples Z R^T.
_PRODUCTS = (
    (1, 2304, 2304, 2304),
    (1, 4608, 4608, 4608),
    (4, 1152, 1152, 1152),
    (1, 1274, 2048, 2048),
    (1, 1274, 4608, 4608),
)


# Layers whose patches are small enough for the fused statistics.
_SMALL = (
    conv(26, 3, 224, 7, stride=2),
    conv(26, 64, 56, 1),
    conv(26, 3, 224, 11, stride=4, padding=2),
    conv(26, 3, 32, 3),
)


def shapes() -> list[Shape]:
    """The sizes of ResNet layers at a training batch's sampled tenth and the whole of it.

    The most telling first, should the time not do for all. Asking needs no GPU.
    """
    ranked: list[tuple[int, Shape]] = [(1, shape) for shape in _matrix_shapes()]
    for n in (26, 256):
        cases = [with_batch(case, n) for case in resnets()]
        for case in sorted(cases, key=lambda case: case.kernel != (3, 3)):
            main = case.kernel == (7, 7) or (case.kernel == (3, 3) and case.stride == (1, 1))
            for precision in PRECISIONS:
                rank = (0 if main else 2) + (3 if n == 256 else 0)
                rank += 6 if precision in ("ieee", "fp16") else 0
                ranked += [(rank, shape) for shape in gram_shapes(case, precision)]
    return [shape for _, shape in sorted(ranked, key=lambda pair: pair[0])]


def gram_shapes(case: Case, precision: str) -> Iterator[Shape]:
    """One for each kernel that may compute S of this case and has tiles to choose from."""
    pointwise = case.is_linear or case.kernel == (1, 1)
    for kernel in _GRAMS:
        if case.is_linear or (kernel == "gram_direct" and pointwise):
            continue
        if kernel == "gram_shift_tma" and precision not in ("bf16", "fp16"):
            continue
        make = partial(_gram_problem, kernel, precision, case)
        yield Shape(kernel, precision, case.name, make)


def _matrix_shapes() -> Iterator[Shape]:
    for sizes in _PRODUCTS:
        groups, rows, columns, inner = sizes
        label = f"{groups} of {rows}x{columns}x{inner}"
        yield Shape("product", "tf32x3", label, partial(_product_problem, *sizes))
    for precision in ("tf32x3", "tf32", "ieee"):
        for dim in _DIMS:
            for groups in _GROUPS:
                label, update = (
                    f"{groups} of D {dim}",
                    partial(_update_problem, precision, groups, dim),
                )
                yield Shape("symmetric_update", precision, label, update)
    for precision in ("tf32", "ieee"):
        yield from (stats_shape(case, precision) for case in _SMALL)


def stats_shape(case: Case, precision: str) -> Shape:
    """Of the fused statistics."""
    return Shape("decor_stats", precision, case.name, partial(_stats_problem, precision, case))


def _gram_problem(kernel: str, precision: str, case: Case, device: torch.device) -> Problem | None:
    from dbp_kernels.backends.triton import (
        configs,
        gram_direct,
        gram_shift,
        gram_shift_tma,
        runtime,
    )

    x, geometry = (
        random_input(case, device, PRECISIONS[precision], channels_last=True),
        case.geometry,
    )
    compute = {
        gram_shift.KERNEL: gram_shift.patch_gram_shift,
        gram_direct.KERNEL: gram_direct.patch_gram_direct,
        gram_shift_tma.KERNEL: gram_shift_tma.patch_gram_shift_tma,
    }[kernel]
    if kernel == gram_shift_tma.KERNEL and not gram_shift_tma.usable(x, geometry):
        return None
    return Problem(
        kernel,
        precision,
        (gram_direct if kernel == gram_direct.KERNEL else gram_shift).sizes(geometry),
        configs.configs(kernel, precision, runtime.target(device)),
        _in(precision, lambda config: compute(x, geometry, config)),
        lambda: oracle(x, case),
    )


def _in(precision: str, run: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """``run`` with products of float32 in this precision."""

    def within(config: object) -> torch.Tensor:
        with products_in(precision):
            return run(config)

    return within


def _stats_problem(precision: str, case: Case, device: torch.device) -> Problem | None:
    """Of the fused statistics; None where D is too large for every tile."""
    from dbp_kernels import reference
    from dbp_kernels.backends.triton import configs, gram_direct, runtime, stats

    x, geometry = random_input(case, device, torch.bfloat16, channels_last=True), case.geometry
    dim = geometry.dim
    every = configs.configs(stats.KERNEL, precision, runtime.target(device))
    fit = tuple(c for c in every if c.block_m >= dim)
    if not fit:
        return None
    R = torch.eye(dim, device=x.device).expand(geometry.groups, dim, dim).contiguous()
    return Problem(
        stats.KERNEL,
        precision,
        gram_direct.sizes(geometry),
        fit,
        _in(precision, lambda config: stats.decor_stats(x, R, geometry, config=config)[0]),
        lambda: reference.decor_stats(x.double(), R.double(), *case.window)[0],
    )


def _update_problem(precision: str, groups: int, dim: int, device: torch.device) -> Problem:
    from dbp_kernels.backends.triton import configs, runtime, update
    from dbp_kernels.rules import UpdateRule

    generator = torch.Generator().manual_seed(0)
    B = torch.randn(groups, dim, dim, generator=generator).to(device)
    A = B / dim
    rule = UpdateRule.make("standard", 0.5, dim)
    diagonal = torch.eye(dim, dtype=torch.float64, device=device)

    def exact() -> torch.Tensor:
        M = A.double() @ B.double().mT
        return rule.c_weight * M * (1 - diagonal) + rule.v_weight * (M - 1) * diagonal

    return Problem(
        update.KERNEL,
        precision,
        {"groups": groups, "dim": dim, "inner": dim},
        configs.configs(update.KERNEL, precision, runtime.target(device)),
        _in(precision, lambda config: update.symmetric_update(A, B, 1.0, rule, config)[0]),
        exact,
    )


def _product_problem(
    groups: int, rows: int, columns: int, inner: int, device: torch.device
) -> Problem:
    from dbp_kernels.backends.triton import configs, product, runtime

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(groups, rows, inner, generator=generator).to(device)
    B = torch.randn(groups, columns, inner, generator=generator).to(device)
    every = configs.configs(product.KERNEL, product.PRECISION, runtime.target(device))
    return Problem(
        product.KERNEL,
        product.PRECISION,
        {"groups": groups, "rows": rows, "columns": columns, "inner": inner},
        tuple(c for c in every if product.usable(c, columns, inner)),
        _in(product.PRECISION, lambda config: product.product(A, B, config)),
        lambda: A.double() @ B.double().mT,
    )


def refuse() -> str | None:
    """None if this machine can be tuned for, else the reason."""
    if not torch.cuda.is_available():
        return "tuning needs a CUDA device and none is available"
    if torch.cuda.is_current_stream_capturing():
        return "tuning is not possible while a CUDA graph is captured"
    from dbp_kernels import backends

    return backends.unusable("triton", "cuda")


def fastest(
    problem: Problem, device: torch.device, pairs: int = PAIRS
) -> tuple[Any, dict[str, float]]:
    """(the best candidate, seconds of each by its text); wrong or failing ones do not count.

    Raises RuntimeError if none is left.
    """
    right, reasons = working(problem)
    if not right:
        raise RuntimeError(f"{problem.kernel} {problem.sizes}: " + "; ".join(reasons))
    calls = {config.text: partial(problem.run, config) for config in right}
    # without the launches, which are the same for all
    spreads, uncaptured = time_replayed(calls, pairs, device=device)
    if uncaptured:
        spreads = time_interleaved(calls, pairs, device=device)
    seconds = {text: spread.median for text, spread in spreads.items()}
    return min(right, key=lambda config: seconds[config.text]), seconds


def working(problem: Problem) -> tuple[list[Any], list[str]]:
    """(the candidates whose results are right, why the others are out)."""
    exact = problem.exact()
    right, reasons = [], []
    for config in problem.candidates:
        try:
            off = error(problem.run(config), exact)
        except Exception as failure:
            reasons.append(f"{config.text}: {type(failure).__name__}: {failure}"[:200])
            continue
        if off > 1e-2:
            reasons.append(f"{config.text}: error {off:.1e}")
            continue
        right.append(config)
    return right, reasons


def entry(problem: Problem, device: torch.device, pairs: int = PAIRS) -> dict[str, Any]:
    """What is pinned for a problem: {"sizes", "config", "seconds"}. Raises what ``fastest`` does."""
    best, seconds = fastest(problem, device, pairs)
    return {
        "sizes": problem.sizes,
        "config": asdict(best),
        "seconds": {text: float(f"{s:.3g}") for text, s in seconds.items()},
    }


def tune(
    problems: Iterable[Problem],
    device: torch.device,
    keep: Callable[[dict[str, Any]], object] = lambda table: None,
) -> tuple[dict[str, Any], list[str]]:
    """The table to pin, {kernel: {precision: [entries]}}, and what failed.

    ``keep`` is given the table after every problem; Ctrl-C ends the search.
    """
    table: dict[str, Any] = {}
    failures = []
    try:
        for problem in problems:
            try:
                found = entry(problem, device)
            except RuntimeError as failure:
                failures.append(str(failure))
                continue
            table.setdefault(problem.kernel, {}).setdefault(problem.precision, []).append(found)
            keep(table)
            what = f"{problem.kernel} {problem.precision} {problem.sizes}"
            print(f"{what}: {min(found['seconds'], key=found['seconds'].get)}", flush=True)
    except KeyboardInterrupt:
        failures.append("interrupted")
    return table, failures


def write(table: dict[str, Any], device_name: str, capability: int, folder: Path = FOLDER) -> Path:
    """Writes (or replaces) the GPU's file."""
    root = origin.clone()
    content = {
        "capability": capability,
        "device": device_name,
        "origin": {
            "torch": torch.__version__,
            "commit": origin.commit(root),
            "dirty": origin.dirty(root),
        },
        "pinned": table,
    }
    path = folder / f"{origin.slug(device_name)}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help='on "kernel precision: shape"'
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no problem after them"
    )


def main(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    reason = refuse()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    from dbp_kernels.backends.triton import runtime

    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + options.seconds
    wanted = re.compile(options.filter)
    made = (s.make(device) for s in shapes() if wanted.search(s.name) and time.monotonic() < end)
    save = partial(
        write,
        device_name=torch.cuda.get_device_name(device),
        capability=runtime.target(device),
    )
    table, failures = tune(filter(None, made), device, save)
    if table:
        print(f"saved {save(table)}")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures or not table else 0
