"""Suite "accumulation": a training step of several micro-steps, with A = W R formed at each or once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Settings, failed
from .networks import SMALL, StepCase
from .steps import BP, DECOR_LR, KAPPA, LR, OURS, random_images, verdict
from .timing import time_interleaved

CASES = SMALL
MICRO_STEPS = 4
AT_EACH = "dbp, A at each"


def _step(
    model: nn.Module, settings: Settings, sample: float | None, held: bool
) -> Callable[[Tensor, Tensor], Tensor]:
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
    images, labels = random_images(case, settings, batch)
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    records: dict[str, dict] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    expected = None
    for name, part, held in ((BP, None, False), (OURS, sample, True), (AT_EACH, sample, False)):
        try:
            step = _step(copy.deepcopy(model), settings, part, held)
            loss = float(step(images, labels))
        except Exception as failure:  # whatever it is, the other variants get their numbers
            records[name] = failed(failure)
            continue
        expected = loss if expected is None else expected
        records[name] = verdict(loss, expected)
        if records[name]["status"] == "ok":
            calls[name] = lambda step=step: step(images, labels)
    times = time_interleaved(
        calls,
        settings.pairs or case.pairs,
        device=settings.device,
        warmup=settings.warmup,
        tick=tick,
    )
    for name, spread in times.items():
        records[name]["seconds"] = spread.as_dict()
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "micro_steps": MICRO_STEPS,
        "methods": records,
    }
