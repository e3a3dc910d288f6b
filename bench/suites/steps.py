"""Suite "step": whole training steps of one network, plain, decorrelated and as published."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import bars
from bench.core.breakdown import breakdown, breakdown_table, write_trace
from bench.core.networks import SMALL, StepCase, at_224, jobs_on
from bench.core.plots import ratio_panels, slowdown
from bench.core.suite import Job, Settings, Suite, failed
from bench.core.table import format_table, milliseconds
from bench.rivals.published import publish_model, publish_update
from bench.suites.kernels import plan_for
from dbp_kernels.tools.timing import SHORTEST_SAMPLE, time_interleaved

BP, OURS, PUBLISHED = "bp", "dbp", "published"
LAYERS = "dbp layers"  # the layer form; OURS is the optimiser form
LR, DECOR_LR, KAPPA = 1.6e-4, 1e-5, 0.5  # the paper's setting
SAMPLES = (1.0, 0.1, 0.01)
UPDATE_EVERY = (1, 4, 16)
# Seconds of steps in a row that a sample on a GPU averages: in training nobody waits for the device
# between two steps, and the host works ahead.
IN_A_ROW = 0.4
IDLE, NEVER_AGAIN = "dbp idle", 10**9  # the first step updates, at which variants are checked
COMPILE_MODES = ("default", "reduce-overhead")

# The paper's networks at the paper's size, where a CPU takes minutes for one step.
STEP_CASES = SMALL
_BY_NAME = {case.name.split()[0]: case for case in at_224(256, 9)}
GPU_STEP_CASES = tuple(_BY_NAME[name] for name in ("resnet50", "resnet18", "resnet34"))

Step = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")


def plain_step(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    compiled: str | None = None,
    beside: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """One step of backpropagation with Adam on the cross entropy; returns the loss.

    With a lower ``dtype`` the forward pass runs under autocast. ``compiled`` is a mode of
    torch.compile; the mode "reduce-overhead" records CUDA graphs where that is possible.
    ``beside`` makes a context for what follows the forward pass.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    return _step_of(model, optimizer, dtype, compiled, beside)


def attached_step(
    model: nn.Module,
    sample: float,
    dtype: torch.dtype = torch.float32,
    compiled: str | None = None,
    **options: object,
) -> Step:
    """The library's optimiser form: the same step by an optimiser under ``dbp.attach(**options)``."""
    import dbp_kernels as dbp

    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    dbp.attach(model, optimizer, lr=DECOR_LR, kappa=KAPPA, sample=sample, **options)
    return _step_of(model, optimizer, dtype, compiled)


def _step_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    compiled: str | None,
    beside: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    if compiled:
        model = torch.compile(model, mode=compiled)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        with beside():
            loss.backward()
            optimizer.step()
        return loss

    return step


def decorrelated_step(
    model: nn.Module,
    sample: float,
    dtype: torch.dtype,
    update_every: int = 1,
    compiled: str | None = None,
    overlap: bool = False,
    **options: object,
) -> Step:
    """The library's layer form: ``DecorUpdate.step()`` after the same step, or ``overlap()`` beside it."""
    import dbp_kernels as dbp

    dbp.decorrelate_model(model)
    update = dbp.DecorUpdate(
        model,
        lr=DECOR_LR,
        kappa=KAPPA,
        sample=sample,
        update_every=update_every,
        **options,
    )
    if overlap:
        return plain_step(model, dtype, compiled, update.overlap)
    return _followed_by(plain_step(model, dtype, compiled), update.step)


def published_step(model: nn.Module, sample: float, dtype: torch.dtype) -> Step:
    """The published algorithm: the same step, then its update, every step."""
    publish_model(model)
    update = lambda: publish_update(model, DECOR_LR, KAPPA, sample)  # noqa: E731
    return _followed_by(plain_step(model, dtype), update)


def _followed_by(step: Step, update: Callable[[], object]) -> Step:
    def both(images: Tensor, labels: Tensor) -> Tensor:
        loss = step(images, labels)
        update()
        return loss

    return both


def variants(sample: float, dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Step]]:
    """{name: what turns a network into its training step}."""
    return {
        BP: lambda model: plain_step(model, dtype),
        OURS: lambda model: attached_step(model, sample, dtype),
        LAYERS: lambda model: decorrelated_step(model, sample, dtype),
        PUBLISHED: lambda model: published_step(model, sample, dtype),
    }


def sampling_variants(dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Step]]:
    """The library's step at other samples, and "idle": a step between two updates.

    With update_every=k, one step of k is an update at its sample, the others are idle.
    """
    makers = {
        sampled(sample): lambda model, sample=sample: attached_step(model, sample, dtype)
        for sample in SAMPLES
    }
    return {
        **makers,
        IDLE: lambda model: attached_step(model, 0.1, dtype, update_every=NEVER_AGAIN),
    }


def faster_variants(sample: float, dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Step]]:
    """The library's step with a faster update: in low precision, or beside the backward pass."""
    return {
        "dbp medium": lambda m: attached_step(m, sample, dtype, matmul_precision="medium"),
        "dbp layers overlap": lambda m: decorrelated_step(m, sample, dtype, overlap=True),
    }


def sampled(sample: float) -> str:
    """The name of the variant at a sample."""
    return f"dbp {sample:.0%}"


def compiled_variants(
    sample: float, dtype: torch.dtype, mode: str
) -> dict[str, Callable[[nn.Module], Step]]:
    """Plain and decorrelated steps under torch.compile."""
    return {
        f"bp {mode}": lambda model: plain_step(model, dtype, mode),
        f"dbp {mode}": lambda model: attached_step(model, sample, dtype, mode),
    }


def run_step_case(
    case: StepCase,
    settings: Settings,
    *,
    batch: int | None = None,
    sample: float = 0.1,
    methods: Sequence[str] = (BP, OURS, LAYERS, PUBLISHED),
    samplings: bool = False,
    faster: bool = False,
    compiled: str | None = None,
    trace: Path | None = None,
    tick: Callable[[], object] = lambda: None,
    makers: Mapping[str, Callable[[nn.Module], Step]] | None = None,
    ours: str = OURS,
) -> dict:
    """Times one step of every variant in ``methods``, interleaved; returns the case's record.

    ``samplings`` adds the ``sampling_variants``, ``faster`` the ``faster_variants``, ``compiled``
    (a mode of torch.compile) the ``compiled_variants``; ``trace`` is where a profiler's trace of the
    steps goes. ``makers`` are the variants instead of all these. What the variant ``ours`` takes
    beyond ``BP`` is broken down.

    All variants start from one and the same network. First a step of each on the same data: with R
    at the identity their losses must agree (1e-3 relative), else the variant is "wrong" and gets
    no number.
    """
    batch = batch or case.batch
    makers = dict(makers or {})
    if not makers:
        makers = {k: v for k, v in variants(sample, settings.dtype).items() if k in methods}
    if samplings:
        makers.update(sampling_variants(settings.dtype))
    if faster:
        makers.update(faster_variants(sample, settings.dtype))
    if compiled:
        torch._dynamo.reset()  # no limit of recompilations is met because of other networks
        makers.update(compiled_variants(sample, settings.dtype, compiled))
    model, images, labels = start(case, settings, batch)
    records, calls = time_steps(makers, model, images, labels, settings, case.pairs, tick)
    more = {}
    if {BP, ours} <= set(calls):
        try:
            pair = calls[ours], calls[BP]
            more["breakdown"] = breakdown(*pair, settings.device, settings.profiled)
        except Exception as failure:  # where the profiler may not be used, say: times stand
            more["no_breakdown"] = failed(failure)["reason"]
    if trace is not None:
        write_trace(trace, calls, settings.device)
    plans = planned_updates(model, images[: max(1, round(sample * batch))])
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "update_every": 1,
        "plans": plans,
        **more,
        "methods": records,
    }


def start(case: StepCase, settings: Settings, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, images, labels), the same in every run."""
    images, labels = random_images(case, settings, batch)
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, images, labels


def time_steps(
    makers: Mapping[str, Callable[[nn.Module], Step]],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    pairs: int,
    tick: Callable[[], object],
) -> tuple[dict[str, dict], dict[str, Callable[[], Tensor]]]:
    """(every variant's record, {those that are right: one step}), timed interleaved.

    Each starts from a copy of the network; its first loss must be that of the first variant.
    """
    records, steps = those_right(makers, model, lambda step: step(images, labels))
    calls = {name: partial(step, images, labels) for name, step in steps.items()}
    times = time_interleaved(
        calls,
        settings.pairs or pairs,
        device=settings.device,
        warmup=settings.warmup,
        shortest_sample=IN_A_ROW if settings.device.type == "cuda" else SHORTEST_SAMPLE,
        tick=tick,
    )
    for name, spread in times.items():
        records[name]["seconds"] = spread.as_dict()
    return records, calls


def those_right(
    makers: Mapping[str, Callable[[nn.Module], T]], model: nn.Module, first: Callable[[T], Tensor]
) -> tuple[dict[str, dict], dict[str, T]]:
    """(every variant's record, what the right ones have made of a copy of the network).

    ``first`` gives the first loss of what was made: that of the first variant, for the others.
    """
    records: dict[str, dict] = {}
    right: dict[str, T] = {}
    expected = None
    for name, make in makers.items():
        try:
            own = make(copy.deepcopy(model))
            loss = float(first(own).detach())
        except Exception as failure:  # whatever it is, the other variants get their numbers
            records[name] = failed(failure)
            continue
        expected = loss if expected is None else expected
        records[name] = verdict(loss, expected)
        if records[name]["status"] == "ok":
            right[name] = own
    return records, right


def verdict(loss: float, expected: float) -> dict:
    """The record of a variant by its first loss: R is the identity, so it must be as expected."""
    if abs(loss - expected) <= 1e-3 * abs(expected):
        return {"status": "ok"}
    reason = f"first loss {loss:.6g}, plain backpropagation's {expected:.6g}"
    return {"status": "wrong", "reason": reason}


def random_images(case: StepCase, settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    """(images, labels), the same in every run."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, case.size, case.size, generator=generator)
    labels = torch.randint(case.classes, (count,), generator=generator)
    images = images.to(settings.device)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels.to(settings.device)


def planned_updates(model: nn.Module, images: Tensor) -> dict[str, str]:
    """{layer: "D, n: the planner's update plan"} for every layer that sees these sampled images."""
    plans: dict[str, str] = {}

    def look(name: str, layer: nn.Conv2d | nn.Linear, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            window, n = ((), (), (), (), 1), x.numel() // x.shape[-1]
        else:
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            n = x.shape[0] * y.shape[2:].numel()
        best = plan_for("update_choices", x, window)
        if best is not None:
            plans[name] = f"D {layer.weight[0].numel()}, n {n}: {best}"

    hooks = [
        layer.register_forward_hook(lambda layer, x, y, name=name: look(name, layer, x[0], y))
        for name, layer in model.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return plans


def step_table(records: Sequence[dict]) -> str:
    """One row a network and variant: milliseconds a step and the ratio to plain backpropagation."""
    rows = [["network", "sample", "variant", "ms [quartiles]", "x bp", "pairs"]]
    for record in records:
        for name, method in record["methods"].items():
            ratio = slowdown(record, name)
            rows.append(
                [
                    record["name"],
                    f"{record['sample']:g}",
                    name,
                    milliseconds(method),
                    "-" if ratio is None else f"{ratio:.3f}",
                    str(method["seconds"]["samples"]) if "seconds" in method else "-",
                ]
            )
    return format_table(rows)


def step_text(records: Sequence[dict]) -> str:
    """The table of steps; samplings where they were measured; where the extra time goes."""
    parts = [step_table(records)]
    grid = [record for record in records if IDLE in record["methods"]]
    if grid:
        parts += ["by sample and update_every", sampling_table(grid)]
    broken_down = [record for record in records if "breakdown" in record]
    if broken_down:
        parts += ["where our extra time goes", breakdown_table(broken_down)]
    return "\n\n".join(parts)


def sampling_table(records: Sequence[dict]) -> str:
    """Ratio to plain backpropagation by sample and update_every.

    With update_every=k: one step with an update and k - 1 idle ones, as measured, over k plain ones.
    """
    rows = [["network", "sample", *(f"every {k}" for k in UPDATE_EVERY)]]
    for record in records:
        idle = bars.speedup(record, IDLE, "bp")
        for sample in SAMPLES:
            updating = bars.speedup(record, sampled(sample), "bp")
            cells = ["-"] * len(UPDATE_EVERY)
            if None not in (idle, updating):
                cells = [f"{(updating + (k - 1) * idle) / k:.3f}" for k in UPDATE_EVERY]
            rows.append([record["name"], f"{sample:.0%}", *cells])
    return format_table(rows)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = STEP_CASES
    if options.device.type != "cpu":
        cases = (*cases, *at_224(256, 9))
    return jobs_on(
        "step",
        run_step_case,
        cases,
        options,
        settings,
        traced=True,
        samplings=options.samplings,
        faster=options.faster,
        compiled=options.compile,
    )


_LABEL = "time of a step over plain backpropagation's"
SUITE = Suite(
    "whole training steps",
    step_text,
    _jobs,
    ratio_panels("step", _LABEL, slowdown, (OURS, LAYERS, PUBLISHED)),
)
