"""Suite "accumulation": a training step of several micro-steps, with A = W R formed at each or once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Settings
from .networks import SMALL, StepCase
from .steps import BP, DECOR_LR, KAPPA, LR, OURS, Step, start, time_steps

CASES = SMALL
MICRO_STEPS = 4
AT_EACH = "dbp, A at each"


def _step(model: nn.Module, settings: Settings, sample: float | None, held: bool) -> Step:
    """One step of Adam from the gradients of ``MICRO_STEPS`` parts of the batch; returns the loss.

    ``sample`` is None for plain backpropagation.
    """
    import dbp_kernels as dbp

    decor = None
    if sample is not None:
        dbp.decorrelate_model(model)
        decor = dbp.DecorUpdate(model, lr=DECOR_LR, kappa=KAPPA, sample=sample)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    dtype = settings.dtype

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        with dbp.accumulate_gradients(model) if held else contextlib.nullcontext():
            for x, y in zip(images.chunk(MICRO_STEPS), labels.chunk(MICRO_STEPS)):
                with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                    loss = F.cross_entropy(model(x), y) / MICRO_STEPS
                loss.backward()
                total = total + loss.detach()
        optimizer.step()
        if decor is not None:
            decor.step()
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
    """Times one step of plain backpropagation and of ours with and without ``accumulate_gradients``.

    As in suite "step", the first loss of each must be plain backpropagation's.
    """
    batch = batch or case.batch
    makers = {
        BP: lambda model: _step(model, settings, None, held=False),
        OURS: lambda model: _step(model, settings, sample, held=True),
        AT_EACH: lambda model: _step(model, settings, sample, held=False),
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
