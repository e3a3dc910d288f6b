"""Stages of whole training steps of the ResNets, each variant of ours beside plain backpropagation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bench.core.networks import SMALL
from bench.device.layers import judged
from bench.device.stage import DTYPE, RESULT, Setting, Stage
from bench.suites.kernels import Settings
from bench.suites.steps import (
    BP,
    GPU_STEP_CASES,
    OURS,
    Step,
    attached_step,
    decorrelated_step,
    plain_step,
    run_step_case,
)
from dbp_kernels.backends import NAMES, backend
from dbp_kernels.optim.graphs import WARM_UP
from dbp_kernels.precision import matmul_precision
from dbp_kernels.verify.workers import Case

_LIMIT, _PAIRS, _SAMPLE = 60.0, 9, 0.1  # fewer pairs are too few for the bars
NETWORKS = {case.name.split()[0]: case for case in GPU_STEP_CASES if "resnet34" not in case.name}
_REHEARSED = {"convnet": replace(SMALL[0], batch=4, pairs=1)}


def _networks(setting: Setting) -> dict:
    return _REHEARSED if setting.rehearse else NETWORKS


def ratios(setting: Setting) -> list[Case]:
    """As a user gets it, at the default precision."""
    return [Case(f"{OURS}: {network}", _LIMIT) for network in _networks(setting)]


def variants(setting: Setting) -> list[Case]:
    """By precision, in the layer form, and by backend. "auto" takes Triton's kernels if there are any."""
    cuda = ["cuda"] if "cuda" in setting.families() else []
    wanted = ("high", "layers", *cuda, "eager", "layers overlap")
    methods = [OURS, *(f"{OURS} {what}" for what in wanted)]
    return [Case(f"{m}: {network}", _LIMIT) for m in methods for network in _networks(setting)]


def run(name: str, setting: Setting) -> dict:
    """One variant, by CUDA graphs and launched as it is, and plain backpropagation, interleaved.

    Also where the extra time goes.
    """
    method, _, network = name.partition(": ")
    how = method.split()[1:]
    # profiles of a ResNet take long to read; the default variant is profiled more often
    profiled = 3 if method == OURS else 1
    settings = Settings(
        setting.torch_device,
        DTYPE,
        _PAIRS,
        warmup=WARM_UP + 1,  # and the step that is checked: a graph has been captured then
        channels_last=True,
        profiled=profiled,
    )
    if setting.rehearse:
        settings = replace(settings, dtype=torch.float32, pairs=1, warmup=1)
    high = "high" if "high" in how else None  # of the update, and of all other products

    def make(model: nn.Module, cuda_graph: bool) -> Step:
        options = {"matmul_precision": high, "cuda_graph": cuda_graph}
        if "layers" in how:
            overlap = "overlap" in how
            return decorrelated_step(model, _SAMPLE, settings.dtype, overlap=overlap, **options)
        return attached_step(model, _SAMPLE, settings.dtype, **options)

    graphs = "overlap" not in how  # which they do not do
    makers = {
        BP: lambda model: plain_step(model, settings.dtype),
        method: partial(make, cuda_graph=graphs),
    }
    if graphs:
        makers[f"{method} launched"] = partial(make, cuda_graph=False)
    case = _networks(setting)[network]
    named = next((backend(name) for name in how if name in NAMES), nullcontext())
    # around the breakdown too
    with named, matmul_precision(high) if high else nullcontext():
        record = run_step_case(case, settings, sample=_SAMPLE, makers=makers, ours=method)
    told = {}
    plain = record["methods"][BP]
    for key, found in record["methods"].items():
        if key != BP and "seconds" in found and "seconds" in plain:
            ratio = found["seconds"]["median"] / plain["seconds"]["median"]
            found["ratio"] = float(f"{ratio:.4g}")
            told["ratio" + key.removeprefix(method)] = found["ratio"]
    found = record["methods"][method]
    if method != OURS:
        record["breakdowns"] = {method: record.pop("breakdown", None)}
    return {**judged(found), **told, RESULT: {"step": [record]}}


RATIOS = Stage("ratios", 45, ratios, run)
STEPS = Stage("steps", 80, variants, run)
