"""Suite "memory": the most memory that two training steps need, against plain backpropagation.

Counted from before the network is made: weights, gradients, Adam's moments, R, activations, samples
and workspaces. The second step is the first with all of the optimiser's state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from bench.kernels import Settings, failed
from bench.memory import peak_and_live
from bench.networks import SMALL, StepCase, at_224
from bench.steps import BP, random_images, variants, verdict
from bench.updates import matrices

CPU_CASES = (*SMALL, *at_224(8, 1))
CPU_DEFAULT = r"convnet|resnet18|vit-s"  # what a CPU measures unless --filter asks for others
GPU_CASES = at_224(256, 1)
STEPS = 2


def run_memory_case(
    case: StepCase,
    settings: Settings,
    *,
    batch: int | None = None,
    sample: float = 0.1,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Peak memory of every variant's first steps; returns the case's record.

    A variant whose first loss is not plain backpropagation's is "wrong" and gets no number.
    "resident_bytes" live on after the steps: weights, gradients, Adam's moments, R.
    """
    batch = batch or case.batch
    images, labels = random_images(case, settings, batch)
    torch.manual_seed(0)
    model = case.build()
    records: dict[str, dict] = {}
    expected, r_bytes = None, 0
    for name, make in variants(sample, settings.dtype).items():
        kept: dict = {}

        def train(make=make, kept=kept) -> None:
            kept["model"] = copy.deepcopy(model).to(settings.device)
            if settings.channels_last:
                kept["model"].to(memory_format=torch.channels_last)
            kept["step"] = make(kept["model"])
            kept["loss"] = kept["step"](images, labels).detach()
            for _ in range(STEPS - 1):
                kept["step"](images, labels)

        try:
            peak, live = peak_and_live(train, settings.device)
            loss = float(kept["loss"])
        except Exception as failure:  # whatever it is, the other variants get their numbers
            records[name] = failed(failure)
            continue
        expected = loss if expected is None else expected
        records[name] = verdict(loss, expected)
        if records[name]["status"] == "ok":
            records[name].update(peak_bytes=peak, resident_bytes=live)
        if name != BP:
            held = matrices(kept["model"]).values()
            r_bytes = sum(R.numel() * R.element_size() for R in held)
        kept.clear()
        tick()
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "update_every": 1,
        "R_bytes": r_bytes,
        "methods": records,
    }
