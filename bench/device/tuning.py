"""Stages that find the fastest tile shapes: first all are compiled, side by side, then timed."""

from __future__ import annotations

from dataclasses import replace

from bench.core import registry
from bench.device.stage import RESULT, SKIPPED, Setting, Stage, before_colon
from dbp_kernels.tools import tune
from dbp_kernels.verify.workers import Case

_LIMIT = 30.0
_REHEARSED = (registry.conv(1, 9, 3, 2, padding=0),)


def _shapes(setting: Setting) -> list[tune.Shape]:
    if "triton" not in setting.families():
        return []
    if setting.rehearse:
        precisions = ("bf16", "tf32")
        return [s for c in _REHEARSED for p in precisions for s in tune.gram_shapes(c, p)]
    return tune.shapes()


def to_compile(setting: Setting) -> list[Case]:
    """One shape for each variant of the code: kernel, precision, and the kind of convolution."""
    kinds = {}
    for shape in _shapes(setting):
        kind = (before_colon(shape.name), shape.label.rsplit(" ", 2)[0])
        kinds.setdefault(kind, shape.name)
    return [Case(name, _LIMIT) for name in kinds.values()]


def to_time(setting: Setting) -> list[Case]:
    return [Case(shape.name, _LIMIT) for shape in _shapes(setting)]


def _problem(name: str, setting: Setting) -> tune.Problem | None:
    shape = next(shape for shape in _shapes(setting) if shape.name == name)
    problem = shape.make(setting.torch_device)
    if problem is None or not setting.rehearse:
        return problem
    return replace(problem, candidates=problem.candidates[:1])  # interpreted, all take minutes


_NOT_FOR_IT = {"status": SKIPPED, "reason": "the kernel is not for this shape"}


def compile_all(name: str, setting: Setting) -> dict:
    """Every candidate once: afterwards it is in Triton's cache."""
    problem = _problem(name, setting)
    if problem is None:
        return _NOT_FOR_IT
    right, reasons = tune.working(problem)
    found = {"kernel": problem.kernel, "dtype": problem.precision, "candidates": len(right)}
    return {**found, "status": "failed", "reason": "; ".join(reasons)} if reasons else found


def time_all(name: str, setting: Setting) -> dict:
    """The fastest candidate; "tuned" of the result is what ``python -m dbp_kernels tune`` would write."""
    problem = _problem(name, setting)
    if problem is None:
        return _NOT_FOR_IT
    entry = tune.entry(problem, setting.torch_device, 1 if setting.rehearse else tune.PAIRS)
    pinned = {problem.kernel: {problem.precision: [entry]}}
    tuned = {"capability": setting.machine["capability"], "pinned": pinned}
    fastest = min(entry["seconds"], key=entry["seconds"].get)
    return {"kernel": problem.kernel, "configuration": fastest, RESULT: {"tuned": tuned}}


COMPILATION = Stage("compilation", 20, to_compile, compile_all, workers=8)
TUNING = Stage("tuning", 30, to_time, time_all)
