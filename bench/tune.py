"""``python -m bench tune``: times every shipped tile shape on this GPU and pins the fastest.

Writes dbp_kernels/backends/triton/configs/<gpu>.json, which the package then uses on this GPU and
on others of its compute capability. Nothing is ever tuned while the package is in use: in a CUDA
graph, say, a search would be recorded. Only shipped shapes are candidates, so what is pinned is
what the tests compile.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import check, machine, registry
from .kernels import Settings, make_input
from .timing import time_interleaved

FOLDER = machine.ROOT / "dbp_kernels" / "backends" / "triton" / "configs"


@dataclass(frozen=True)
class Problem:
    """One size of one kernel, in the terms ``configs.pinned`` is asked in.

    ``run(config)`` returns the result, ``exact`` computes it in float64.
    """

    kernel: str
    precision: str
    sizes: dict[str, int]
    candidates: tuple
    run: Callable[[object], torch.Tensor]
    exact: Callable[[], torch.Tensor]


def problems(device: torch.device) -> Iterator[Problem]:
    """The sizes of ResNet layers at a training batch and at its sampled tenth."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for case in (case for n in (256, 26) for case in registry.select("resnet", n)):
        for dtype in dtypes:
            yield from _gram_problems(case, Settings(device, dtype, channels_last=True))
    for case in registry.select("stem|3x3 3@|1x1 64@", 26):
        yield from _stats_problem(case, Settings(device, torch.bfloat16, channels_last=True))
    for dim in (64, 128, 256, 576, 1152, 2304):
        for groups in (1, 4):
            yield _update_problem(groups, dim, device)


def _gram_problems(case: registry.Case, settings: Settings) -> Iterator[Problem]:
    """One for each kernel that computes S of this case and has tiles to choose from."""
    from dbp_kernels.backends.triton import (
        configs,
        gram_direct,
        gram_shift,
        gram_shift_tma,
        runtime,
    )

    x, geometry = make_input(case, settings), _geometry(case)
    precision, target = configs.precision_key(x.dtype), runtime.target(x.device)
    forms: list[tuple] = []
    if not geometry.pointwise:
        forms.append((gram_direct, gram_direct.patch_gram_direct))
    if geometry.axes:
        forms.append((gram_shift, gram_shift.patch_gram_shift))
    if geometry.axes and gram_shift_tma.usable(x, geometry):
        forms.append((gram_shift_tma, gram_shift_tma.patch_gram_shift_tma))
    for module, compute in forms:
        yield Problem(
            module.KERNEL,
            precision,
            (gram_direct if module is gram_direct else gram_shift).sizes(geometry),
            configs.configs(module.KERNEL, precision, target),
            lambda config, compute=compute: compute(x, geometry, config),
            lambda: check.oracle(x, case),
        )


def _geometry(case: registry.Case):
    from dbp_kernels.geometry import make_geometry

    lists = (case.kernel, case.stride, case.padding, case.dilation)
    window = (*(() if case.is_linear else v for v in lists), case.groups)
    return make_geometry(case.input_shape, *window)


def _stats_problem(case: registry.Case, settings: Settings) -> Iterator[Problem]:
    """Of the fused statistics; none where D is too large for every tile."""
    from dbp_kernels import reference
    from dbp_kernels.backends.triton import configs, gram_direct, runtime, stats

    x, geometry = make_input(case, settings), _geometry(case)
    precision, target = configs.precision_key(torch.float32), runtime.target(x.device)
    dim = geometry.dim
    fit = tuple(c for c in configs.configs(stats.KERNEL, precision, target) if c.block_m >= dim)
    if not fit:
        return
    R = torch.eye(dim, device=x.device).expand(geometry.groups, dim, dim).contiguous()
    window = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
    yield Problem(
        stats.KERNEL,
        precision,
        gram_direct.sizes(geometry),
        fit,
        lambda config: stats.decor_stats(x, R, geometry, config=config)[0],
        lambda: reference.decor_stats(x.double(), R.double(), *window)[0],
    )


def _update_problem(groups: int, dim: int, device: torch.device) -> Problem:
    from dbp_kernels.backends.triton import configs, runtime, update
    from dbp_kernels.plans import UpdateRule

    generator = torch.Generator().manual_seed(0)
    B = torch.randn(groups, dim, dim, generator=generator).to(device)
    A = B / dim
    precision = configs.precision_key(torch.float32)
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
        lambda config: update.symmetric_update(A, B, 1.0, rule, config)[0],
        exact,
    )


def refuse() -> str | None:
    """None if this machine can be tuned for, else the reason."""
    if not torch.cuda.is_available():
        return "tuning needs a CUDA device and none is available"
    if torch.cuda.is_current_stream_capturing():
        return "tuning is not possible while a CUDA graph is captured"
    from dbp_kernels import backends

    return backends.unusable("triton", "cuda")


def fastest(problem: Problem, device: torch.device, pairs: int = 5) -> tuple[object, dict]:
    """(the best candidate, seconds of each by its text); wrong or failing ones do not count.

    Raises RuntimeError if none is left.
    """
    exact = problem.exact()
    calls, reasons = {}, []
    for config in problem.candidates:
        try:
            error = check.error(problem.run(config), exact)
        except Exception as failure:
            reasons.append(f"{config.text}: {type(failure).__name__}: {failure}"[:200])
            continue
        if error > 1e-2:
            reasons.append(f"{config.text}: error {error:.1e}")
            continue
        calls[config] = lambda config=config: problem.run(config)
    if not calls:
        raise RuntimeError(f"{problem.kernel} {problem.sizes}: " + "; ".join(reasons))
    spreads = time_interleaved(
        {config.text: call for config, call in calls.items()}, pairs, device=device
    )
    seconds = {text: spread.median for text, spread in spreads.items()}
    return min(calls, key=lambda config: seconds[config.text]), seconds


def tune(problems: Iterable[Problem], device: torch.device) -> tuple[dict, list[str]]:
    """The table to pin, {kernel: {precision: [{"sizes", "config", "seconds"}]}}, and what failed."""
    table: dict = {}
    failures = []
    for problem in problems:
        try:
            best, seconds = fastest(problem, device)
        except RuntimeError as failure:
            failures.append(str(failure))
            continue
        entry = {
            "sizes": problem.sizes,
            "config": asdict(best),
            "seconds": {text: float(f"{s:.3g}") for text, s in seconds.items()},
        }
        table.setdefault(problem.kernel, {}).setdefault(problem.precision, []).append(entry)
        print(f"{problem.kernel} {problem.precision} {problem.sizes}: {best.text}", flush=True)
    return table, failures


def write(table: dict, device_name: str, capability: int, folder: Path = FOLDER) -> Path:
    """Writes (or replaces) the GPU's file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    described = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    content = {
        "capability": capability,
        "device": device_name,
        "origin": {key: described.get(key) for key in ("torch", "commit", "dirty")},
        "pinned": table,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    out = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--filter", default="", metavar="REGEX", help='on "kernel precision"')
    options = out.parse_args(arguments)
    reason = refuse()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    from dbp_kernels.backends.triton import runtime

    device = torch.device("cuda", torch.cuda.current_device())
    wanted = registry.compile_filter(options.filter)
    chosen = [p for p in problems(device) if wanted.search(f"{p.kernel} {p.precision}")]
    table, failures = tune(chosen, device)
    if table:
        path = write(table, torch.cuda.get_device_name(device), runtime.target(device))
        print(f"saved {path}")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures or not table else 0
