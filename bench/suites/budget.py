"""Suite "budget": the share of a step that updates take under a budget, and the loss they reach."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import bars
from bench.core.registry import compile_filter
from bench.core.suite import Job, Settings, Suite, batch_of
from bench.core.table import format_table
from bench.suites.steps import KAPPA, STEP_CASES, StepCase, plain_step
from dbp_kernels.tools import timing

DECOR_LR = 1e-3  # within the few steps here, the paper's 1e-5 would not show
_BATCHES = 8


@dataclass(frozen=True)
class BudgetCase:
    """A network trained under several budgets (None: unlimited), step by step in turn.

    ``rounds``: steps of each after the warm-up. ``every``: rounds from one look at the loss to the
    next.
    """

    name: str
    network: StepCase
    budgets: tuple[float | None, ...]
    rounds: int
    every: int


def _cases() -> Iterator[BudgetCase]:
    convnet, resnet = STEP_CASES
    # beyond step 135, after which costs are not measured again
    yield BudgetCase(convnet.named(), convnet, (*bars.BUDGETS, None), 140, 5)
    for budget in (*bars.BUDGETS, None):  # a step takes seconds: so that one can be run alone
        share = "unlimited" if budget is None else f"{budget:.0%}"
        yield BudgetCase(f"{resnet.named()} {share}", resnet, (budget,), 11, 4)


BUDGET_CASES = tuple(_cases())


def smooth_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random images whose neighbouring pixels and channels agree, as natural ones do: (N, 3, S, S).

    Gaussian noise of every scale, the coarser the stronger (an amplitude of about 1 / frequency);
    zero mean and unit variance over the batch.
    """
    images = torch.zeros(count, 3, size, size)
    scale = 2
    while scale <= size:
        grey = torch.randn(count, 1, scale, scale, generator=generator)
        noise = grey + 0.4 * torch.randn(count, 3, scale, scale, generator=generator)
        images += F.interpolate(noise, size=size, mode="bilinear") / scale
        scale *= 2
    return (images - images.mean()) / images.std()


class _Clock:
    """Replaces the library's clock: stands still for a run while others have their turn.

    It is the benchmark's: with --cpu-time the process's CPU time.
    """

    def __init__(self) -> None:
        self.time = timing.host_clock()
        self.away = 0.0  # seconds that the run whose turn it is has missed

    def __call__(self) -> float:
        return self.time() - self.away

    @contextmanager
    def turn_of(self, run: _Run) -> Iterator[None]:
        self.away = self.time() - run.clock
        try:
            yield
        finally:
            run.clock = self()


@contextmanager
def _timing(now: _Clock) -> Iterator[list[float]]:
    """Times the library by ``now``; appends the seconds of every copy of samples in a forward pass."""
    from dbp_kernels import clock
    from dbp_kernels.sampling import Recorder

    spent: list[float] = []
    record, host = Recorder.record, clock.host

    def timed(self: Recorder, *sample: object) -> None:
        begin = now()
        record(self, *sample)
        spent.append(now() - begin)

    Recorder.record, clock.host = timed, now
    try:
        yield spent
    finally:
        Recorder.record, clock.host = record, host


class _Run:
    """One network under one budget."""

    def __init__(self, model: nn.Module, budget: float | None, dtype: torch.dtype) -> None:
        import dbp_kernels as dbp

        self.model, self.budget = model, budget
        self.step = plain_step(model, dtype)
        self.decor = dbp.DecorUpdate(model, lr=DECOR_LR, kappa=KAPPA, budget=budget)
        self.updates: list[float] = []  # seconds of each step's update
        self.wholes: list[float] = []
        self.curve: list[tuple[float, float]] = []
        self.clock = 0.0  # at the end of its last turn

    def train(self, images: Tensor, labels: Tensor, copies: list[float], now: _Clock) -> None:
        copies.clear()
        begin = now()
        self.step(images, labels)
        stepped = now()
        self.decor.step()
        end = now()
        self.updates.append(sum(copies) + end - stepped)
        self.wholes.append(end - begin)

    def look(self, images: Tensor) -> None:
        self.curve.append((sum(self.wholes), decorrelation_loss(self.model, images)))

    def record(self, warm_up: int) -> dict:
        updates, wholes = self.updates[warm_up:], self.wholes[warm_up:]
        out = {
            "budget": self.budget,
            "share": sum(updates) / sum(wholes),
            "step_seconds": statistics.median(wholes),
            "longest_update": max(updates),
            "seconds": [t for t, _ in self.curve],
            "loss": [loss for _, loss in self.curve],
        }
        if self.budget is not None:
            report = self.decor.schedule()
            out.update(planned=report.planned, reported=report.actual)
            out["layers"] = {
                layer.name: [layer.images, layer.updates, layer.seconds] for layer in report.layers
            }
        return _rounded(out)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


@torch.no_grad()
def decorrelation_loss(model: nn.Module, images: Tensor) -> float:
    """The mean over all layers of the decorrelation loss on these images; nothing is changed.

    Batch norm uses the images' own statistics, as in training.
    """
    import dbp_kernels.nn as dnn
    from dbp_kernels.optim.step import Job, local_updates

    options = {"lr": 0.0, "kappa": KAPPA, "rule": "standard", "demean": False}
    losses: list[Tensor] = []

    def look(layer: nn.Module, x: tuple[Tensor, ...]) -> None:
        losses.append(local_updates([Job(layer, [layer._as_images(x[0])], options)])[0].losses[0])

    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    layers = [m for m in model.modules() if dnn.is_decorrelated(m)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(images)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
    model.train()
    return float(torch.stack(losses).mean())


def run_budget_case(
    case: BudgetCase,
    settings: Settings,
    *,
    batch: int | None = None,
    rounds: int | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Trains equal networks under the case's budgets, a step of each in turn; returns the record.

    A share is the time of the update (copies in the forward pass and ``step()``) over that of the
    whole step, both on the host's clock and summed over all steps after the warm-up; so this suite
    is for CPUs. Looks at the loss are not timed.
    """
    import dbp_kernels as dbp
    from dbp_kernels.optim.schedule import WARM_UP

    network = case.network
    batch = batch or network.batch
    generator = torch.Generator().manual_seed(1)
    batches = [smooth_images(batch, network.size, generator) for _ in range(_BATCHES)]
    labels = [torch.randint(network.classes, (batch,), generator=generator) for _ in batches]
    held_out = smooth_images(min(batch, 32), network.size, generator)
    torch.manual_seed(0)
    model = dbp.decorrelate_model(network.build())
    runs = [_Run(copy.deepcopy(model), budget, settings.dtype) for budget in case.budgets]
    steps = WARM_UP + (rounds or case.rounds)
    now = _Clock()
    with _timing(now) as copies:
        for index in range(steps):
            for run in runs if index % 2 else reversed(runs):
                if index % case.every == 0:
                    run.look(held_out)
                with now.turn_of(run):
                    run.train(batches[index % _BATCHES], labels[index % _BATCHES], copies, now)
            tick()
    for run in runs:
        run.look(held_out)
    return {
        "name": case.name,
        "network": network.name,
        "batch": batch,
        "lr": DECOR_LR,
        "warm_up": WARM_UP,
        "steps": steps,
        "runs": [run.record(WARM_UP) for run in runs],
    }


def budget_table(records: Sequence[dict]) -> str:
    """One row a network and budget."""
    head = ["network", "budget", "actual share", "actual / budget", "step ms", "longest update ms"]
    rows = [[*head, "loss at the start", "end", "after s"]]
    for record in records:
        for run in record["runs"]:
            ratio = "-"
            if run["budget"] is not None:
                value = run["share"] / run["budget"]
                ratio = f"{value:.2f}"
            rows.append(
                [
                    bars.budget_case(record),
                    "unlimited" if run["budget"] is None else f"{run['budget']:.0%}",
                    f"{run['share']:.2%}",
                    ratio,
                    f"{1e3 * run['step_seconds']:.0f}",
                    f"{1e3 * run['longest_update']:.1f}",
                    f"{run['loss'][0]:.3g}",
                    f"{run['loss'][-1]:.3g}",
                    f"{run['seconds'][-1]:.0f}",
                ]
            )
    return format_table(rows)


def plot_budget(records: Sequence[dict], path) -> None:
    """Requested against actual share, and by network the loss against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    networks: dict[str, list[dict]] = {}
    for record in records:
        networks.setdefault(bars.budget_case(record), []).extend(record["runs"])
    panels = 1 + len(networks)
    figure, (left, *rest) = plt.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    limits = [0.5 * min(bars.BUDGETS), 2 * max(bars.BUDGETS)]
    bar = next(bar.bar for bar in bars.BARS if bar.metric == "share")
    left.plot(limits, limits, color="black", linewidth=0.8, label="requested")
    left.plot(limits, [bar * x for x in limits], "k:", linewidth=1, label=f"bar: {bar:g} times")
    for marker, (label, runs) in zip("os^v", networks.items()):
        points = [(run["budget"], run["share"]) for run in runs if run["budget"] is not None]
        if points:
            left.plot(*zip(*points), marker, label=label)
    left.set(xscale="log", yscale="log", xlabel="requested share of the step")
    left.set_ylabel("actual share, all steps after the warm-up")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [f"{tick:.1%}" for tick in ticks])
        axis.set_ticks([], minor=True)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    for axes, (label, runs) in zip(rest, networks.items(), strict=True):
        for run in runs:
            budget = "unlimited" if run["budget"] is None else f"{run['budget']:.0%}"
            axes.plot(run["seconds"], run["loss"], label=budget)
        axes.set(yscale="log", xlabel="seconds of training")
        axes.set_ylabel("decorrelation loss, mean over layers")
        axes.set_title(f"{label}, lr {records[0]['lr']:g}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="budget")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    pattern = compile_filter(options.filter)
    quick = options.quick and not options.filter
    for case in BUDGET_CASES[:1] if quick else BUDGET_CASES:
        if not pattern.search(case.name):
            continue

        def run(tick, case=case):
            batch = batch_of(options)
            return run_budget_case(case, settings, batch=batch, rounds=settings.pairs, tick=tick)

        yield Job("budget", case.name, run, settings.pairs or case.rounds)


SUITE = Suite("budgets", budget_table, _jobs, on_request=True)
