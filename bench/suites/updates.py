"""Suite "update": one whole ``DecorUpdate.step()`` of a network against the published algorithm's.

Only the sampled images go through the network, untimed, before every update; both variants then
update every R from all of what they saw. Both therefore start from the same samples, and taking
the samples, which is part of a training step, is not counted here (the step suite does).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.core import bars
from bench.core.breakdown import write_trace
from bench.core.networks import SMALL, StepCase, at_224, cases_on, jobs_on
from bench.core.plots import ratio_panels
from bench.core.suite import Job, Settings, Suite, failed
from bench.core.table import format_table, milliseconds
from bench.rivals.published import publish_model, publish_update
from bench.suites.steps import DECOR_LR, KAPPA, OURS, PUBLISHED, planned_updates, random_images
from dbp_kernels.tools.timing import time_interleaved

CHECK_LR = 1e-2  # so large that float32 shows what an update changed
BOUND = 1e-3  # of the largest change of R: agreement of two independent float32 computations

# On a CPU the published algorithm takes tens of seconds for one update of a large network.
CPU_CASES = tuple(
    StepCase(case.name, case.build, case.batch, case.size, case.classes, pairs)
    for case, pairs in [(SMALL[0], 9), (SMALL[1], 3), *((case, 3) for case in at_224(32, 3))]
)
CPU_DEFAULT = r"32x32|vit-s"  # what a CPU measures unless --filter asks for others
GPU_CASES = at_224(256, 9)


@dataclass(frozen=True)
class Variant:
    """A network whose update is measured: ``forward`` collects samples, ``update(lr)`` uses them."""

    model: nn.Module
    forward: Callable[[], object]
    update: Callable[[float], object]


def our_update(model: nn.Module, forward: Callable[[nn.Module], object]) -> Variant:
    """The library's, on all images it sees."""
    import dbp_kernels as dbp

    dbp.decorrelate_model(model)
    optimizer = dbp.DecorUpdate(model, lr=DECOR_LR, kappa=KAPPA, sample=1.0)

    def update(lr: float) -> None:
        for group in optimizer.param_groups:
            # a step as large as the check's would be clipped, which the published code does not do
            group.update(lr=lr, clip=None if lr == CHECK_LR else optimizer.defaults["clip"])
        optimizer.step()

    return Variant(model, lambda: forward(model), update)


def published_update(model: nn.Module, forward: Callable[[nn.Module], object]) -> Variant:
    """The published algorithm's, on all images it sees."""
    publish_model(model)
    update = lambda lr: publish_update(model, lr, KAPPA, sample=1.0)  # noqa: E731
    return Variant(model, lambda: forward(model), update)


MAKERS = {OURS: our_update, PUBLISHED: published_update}


def run_update_case(
    case: StepCase,
    settings: Settings,
    *,
    batch: int | None = None,
    sample: float = 0.1,
    trace: Path | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Checks and times the update of every variant; returns the case's record.

    The check is one update of each from the same samples at a large learning rate: every R must
    agree to ``BOUND`` of its largest change, else our update is "wrong" and gets no number.
    ``trace`` is where a profiler's trace of the updates goes.
    """
    batch = batch or case.batch
    count = max(1, round(sample * batch))
    images, _ = random_images(case, settings, count)
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)

    def forward(network: nn.Module) -> None:
        # with gradients: a pass without them takes no samples
        half = settings.dtype != torch.float32
        with torch.autocast(settings.device.type, settings.dtype, enabled=half):
            network(images)

    records: dict[str, dict] = {}
    variants: dict[str, Variant] = {}
    for name, make in MAKERS.items():
        try:
            variants[name] = make(copy.deepcopy(model), forward)
            variants[name].forward()
            variants[name].update(CHECK_LR)
            records[name] = {"status": "ok"}
        except Exception as failure:  # whatever it is, the other variants get their numbers
            records[name] = failed(failure)
    if all(record["status"] == "ok" for record in records.values()):
        error = disagreement(*(matrices(variants[name].model) for name in MAKERS))
        records[OURS]["error"] = float(f"{error:.2e}")
        if not error <= BOUND:
            reason = f"R differs from the published algorithm's by {error:.2e} of its change"
            records[OURS] = {"status": "wrong", "reason": reason}
    right = [name for name, record in records.items() if record["status"] == "ok"]
    for name in right:
        reset(variants[name].model)
    calls = {name: (lambda update=variants[name].update: update(DECOR_LR)) for name in right}
    prepare = {name: variants[name].forward for name in right}
    times = time_interleaved(
        calls,
        settings.pairs or case.pairs,
        device=settings.device,
        warmup=1,  # the check was another
        prepare=prepare,
        tick=tick,
    )
    for name in right:
        records[name]["seconds"] = times[name].as_dict()
    if trace is not None:
        write_trace(trace, calls, settings.device, prepare)
    return {
        "name": case.named(batch),
        "batch": batch,
        "sample": sample,
        "images": count,
        "R_bytes": sum(R.numel() * R.element_size() for R in matrices(model_of(variants)).values()),
        "plans": planned_updates(model, images),
        "methods": records,
    }


def model_of(variants: dict[str, Variant]) -> nn.Module:
    """Any of the networks; one without layers where every variant failed."""
    return next(iter(variants.values())).model if variants else nn.Module()


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """{layer: its R} of a decorrelated network, ours or the published one."""
    return {
        name.removesuffix(".R"): buffer
        for name, buffer in model.named_buffers()
        if name.split(".")[-1] == "R"
    }


def disagreement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of any R over the largest change of that R from the identity.

    Infinite where the layers differ or an entry is not finite.
    """
    if set(ours) != set(theirs) or not ours:
        return float("inf")
    worst = 0.0
    for name, R in theirs.items():
        change = (R - torch.eye(R.shape[-1], device=R.device)).abs().max()
        error = (ours[name].reshape(R.shape) - R).abs().max() / change
        worst = max(worst, float(torch.nan_to_num(error, nan=float("inf"))))
    return worst


@torch.no_grad()
def reset(model: nn.Module) -> None:
    """Every R back to the identity, in place."""
    for R in matrices(model).values():
        R.zero_()
        R.diagonal(dim1=-2, dim2=-1).fill_(1)


def update_table(records: Sequence[dict]) -> str:
    """One row a network: our update, and how many times as long the published one takes."""
    rows = [["network", "images", "R MB", "ours ms [quartiles]", "published ms", "published x"]]
    for record in records:
        ours, published = (record["methods"].get(name) for name in ("dbp", "published"))
        ratio = bars.speedup(record, "published")
        rows.append(
            [
                record["name"],
                str(record["images"]),
                f"{record['R_bytes'] / 1e6:.0f}",
                milliseconds(ours),
                milliseconds(published),
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return format_table(rows)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = cases_on(options, CPU_CASES, CPU_DEFAULT, GPU_CASES)
    return jobs_on("update", run_update_case, cases, options, settings, traced=True)


_LABEL = "time of the published update over ours"
SUITE = Suite(
    "one update of every layer",
    update_table,
    _jobs,
    ratio_panels("update", _LABEL, bars.speedup, (PUBLISHED,)),
)
