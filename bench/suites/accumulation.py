"""Suite "accumulation": a training step of several micro-steps, which the optimiser form makes one of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dbp_kernels as dbp
from bench.core.networks import SMALL, StepCase, jobs_on
from bench.core.plots import ratio_panels, slowdown
from bench.core.suite import Job, Settings, Suite
from bench.suites.steps import (
    BP,
    DECOR_LR,
    KAPPA,
    LAYERS,
    LR,
    OURS,
    Step,
    start,
    step_table,
    time_steps,
)

CASES = SMALL
MICRO_STEPS = 4


def _step(model: nn.Module, method: str, settings: Settings, sample: float) -> Step:
    """One step of Adam from the gradients of ``MICRO_STEPS`` parts of the batch; returns the loss."""
    options = {"lr": DECOR_LR, "kappa": KAPPA, "sample": sample}
    update = None
    if method == LAYERS:
        update = dbp.DecorUpdate(dbp.decorrelate_model(model), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if method == OURS:
        dbp.attach(model, optimizer, **options)
    dtype = settings.dtype

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(images.chunk(MICRO_STEPS), labels.chunk(MICRO_STEPS)):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x), y) / MICRO_STEPS
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        if update is not None:
            update.step()
        return total

    return step


def run_accumulation_case(
    case: StepCase,
    settings: Settings,
    *,
    batch: int | None = None,
    sample: float = 0.1,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Times one step of plain backpropagation and of both our forms.

    As in suite "step", the first loss of each must be plain backpropagation's.
    """
    batch = batch or case.batch
    makers = {
        method: lambda model, method=method: _step(model, method, settings, sample)
        for method in (BP, OURS, LAYERS)
    }
    model, images, labels = start(case, settings, batch)
    records, _ = time_steps(makers, model, images, labels, settings, case.pairs, tick)
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "micro_steps": MICRO_STEPS,
        "methods": records,
    }


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    return jobs_on("accumulation", run_accumulation_case, CASES, options, settings)


_LABEL = "time of a step of several micro-steps over plain backpropagation's"
SUITE = Suite(
    "training steps of several micro-steps",
    step_table,
    _jobs,
    ratio_panels("accumulation", _LABEL, slowdown, (OURS, LAYERS)),
)
