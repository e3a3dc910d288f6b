"""Suite "passes": what a decorrelated network's forward and backward passes take, and its ``step()``.

Of the narrow ResNet-50, whose matrices are tiny, ``step()`` is Python and launches: the host's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dbp_kernels as dbp
from bench.core.networks import SMALL, StepCase, jobs_on
from bench.core.plots import ratio_panels, slowdown
from bench.core.suite import Job, Settings, Suite
from bench.core.table import format_table, milliseconds
from bench.suites.steps import BP, DECOR_LR, KAPPA, LAYERS, LR, OURS, start, those_right
from dbp_kernels.tools.timing import time_interleaved
from experiments.models import resnet50

NARROW = 16  # times fewer channels


def narrow_resnet50() -> nn.Module:
    """ResNet-50's layers, each with a sixteenth of its channels."""
    model = resnet50(10)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels // NARROW or layer.in_channels
                options = {"stride": layer.stride, "padding": layer.padding, "bias": False}
                own = nn.Conv2d(inputs, layer.out_channels // NARROW, layer.kernel_size, **options)
                setattr(parent, name, own)
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(layer.num_features // NARROW))
    model.fc = nn.Linear(model.fc.in_features // NARROW, 10)
    return model


CASES = (*SMALL, StepCase("narrow resnet50 32x32", narrow_resnet50, 2, 32, 10, 25))


class _Network(NamedTuple):
    passes: Callable[[], Tensor]  # zero_grad, forward, loss, backward; returns the loss
    step: Callable[[], object]


def _network(
    model: nn.Module, method: str, x: Tensor, y: Tensor, settings: Settings, sample: float
) -> _Network:
    options = {"lr": DECOR_LR, "kappa": KAPPA, "sample": sample}
    update = None
    if method == LAYERS:
        update = dbp.DecorUpdate(dbp.decorrelate_model(model), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if method == OURS:
        dbp.attach(model, optimizer, **options)

    def passes() -> Tensor:
        optimizer.zero_grad()  # under attach, this drops the samples that no step has used
        if update is not None:
            update.discard()
        with torch.autocast(x.device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        optimizer.step()
        if update is not None:
            update.step()

    return _Network(passes, step)


def run_passes_case(
    case: StepCase,
    settings: Settings,
    *,
    batch: int | None = None,
    sample: float = 0.1,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Times the passes ("methods"), and the ``step()`` that follows them ("step"), interleaved.

    As in suite "step", the first loss of each method must be plain backpropagation's.
    """
    batch = batch or case.batch
    model, images, labels = start(case, settings, batch)

    def make(method: str, own: nn.Module) -> _Network:
        return _network(own, method, images, labels, settings, sample)

    def first(own: _Network) -> Tensor:
        loss = own.passes()
        own.step()
        return loss

    makers = {method: partial(make, method) for method in (BP, OURS, LAYERS)}
    records, networks = those_right(makers, model, first)
    pairs = settings.pairs or case.pairs
    passes = {name: own.passes for name, own in networks.items()}
    common = {"device": settings.device, "warmup": settings.warmup}
    for name, spread in time_interleaved(passes, pairs, tick=tick, **common).items():
        records[name]["seconds"] = spread.as_dict()
    steps = {name: own.step for name, own in networks.items()}
    stepped = time_interleaved(steps, pairs, prepare=passes, **common)
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "methods": records,
        "step": {name: spread.as_dict() for name, spread in stepped.items()},
    }


def passes_table(records: Sequence[dict]) -> str:
    """One row a network and method: its passes, their ratio to plain ones, its ``step()``."""
    rows = [["network", "variant", "passes, ms [quartiles]", "x bp", "step(), ms", "pairs"]]
    for record in records:
        for name, method in record["methods"].items():
            ratio = slowdown(record, name)
            step = record["step"].get(name)
            rows.append(
                [
                    record["name"],
                    name,
                    milliseconds(method),
                    "-" if ratio is None else f"{ratio:.3f}",
                    "-" if step is None else f"{1e3 * step['median']:.2f}",
                    str(method["seconds"]["samples"]) if "seconds" in method else "-",
                ]
            )
    return format_table(rows)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    return jobs_on("passes", run_passes_case, CASES, options, settings)


_LABEL = "time of forward and backward passes over plain backpropagation's"
SUITE = Suite(
    "forward and backward passes, and step() by itself",
    passes_table,
    _jobs,
    ratio_panels("passes", _LABEL, slowdown, (OURS, LAYERS)),
)
