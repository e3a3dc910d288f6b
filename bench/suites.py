"""What each suite measures with given options, as a list of jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from bench import (
    accumulation,
    budget,
    footprint,
    kernels,
    networks,
    registry,
    regret,
    scaling,
    steps,
    updates,
)
from bench.kernels import DEFAULT_PAIRS, Settings

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUICK_BATCH, QUICK_PAIRS = 4, 3


class Job(NamedTuple):
    """One case: ``run(tick)`` returns its record and calls ``tick`` about ``rounds`` times."""

    suite: str
    name: str
    run: Callable[[Callable[[], object]], dict]
    rounds: int


def jobs(options: argparse.Namespace) -> list[Job]:
    """Everything that is to be measured. Raises ValueError for a bad --filter."""
    settings = Settings(
        device=options.device,
        dtype=DTYPES[options.dtype],
        pairs=options.pairs or (QUICK_PAIRS if options.quick else None),
        warmup=1 if options.quick else 2,
        channels_last=options.channels_last,
    )
    every = {name: suite for name, suite in SUITES.items() if name != "budget"}
    chosen = every if options.suite == "all" else {options.suite: SUITES[options.suite]}
    return [job for suite in chosen.values() for job in suite(options, settings)]


def _batch(options: argparse.Namespace) -> int | None:
    return options.batch or (QUICK_BATCH if options.quick else None)


def _kernels(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    tag = "core" if options.quick and not options.filter else None
    methods = kernels.chosen_methods(options.methods, settings)
    for case in registry.select(options.filter, _batch(options), tag):
        run = lambda tick, case=case: kernels.run_case(case, settings, methods, tick)  # noqa: E731
        yield Job("kernels", case.name, run, settings.pairs or DEFAULT_PAIRS)


def _regret(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    tag = "core" if options.quick and not options.filter else None
    cases = registry.select(options.filter, _batch(options), tag)
    for question, case in regret.regret_cases(cases, options.sample):
        run = lambda tick, q=question, c=case: regret.run_regret(q, c, settings, tick)  # noqa: E731
        yield Job("regret", case.name, run, settings.pairs or regret.DEFAULT_PAIRS)


def _on_networks(
    suite: str,
    run_case: Callable[..., dict],
    cases: Sequence[networks.StepCase],
    options: argparse.Namespace,
    settings: Settings,
    rounds: int | None = None,
    traced: bool = False,
    **more: object,
) -> Iterator[Job]:
    """The networks that --filter names; --quick alone takes the first.

    With several of them each has its own trace, <PATH>-<network>.
    """
    pattern = registry.compile_filter(options.filter)
    if options.quick and not options.filter:
        cases = cases[:1]
    batch = _batch(options)
    chosen = networks.matching(cases, pattern)
    for case in chosen:
        own = dict(more)
        if traced and options.trace:
            slug = "-" + case.named(batch).replace(" ", "-") if len(chosen) > 1 else ""
            own["trace"] = options.trace.with_stem(options.trace.stem + slug)

        def run(tick, case=case, own=own):
            return run_case(case, settings, batch=batch, sample=options.sample, tick=tick, **own)

        yield Job(suite, case.named(batch), run, rounds or settings.pairs or case.pairs)


def _default(cases: Sequence[networks.StepCase], default: str, options: argparse.Namespace):
    """On a CPU without --filter, what it measures in minutes."""
    if options.filter:
        return cases
    return networks.matching(cases, registry.compile_filter(default))


def _update(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = updates.GPU_CASES
    if options.device.type == "cpu":
        cases = _default(updates.CPU_CASES, updates.CPU_DEFAULT, options)
    return _on_networks("update", updates.run_update_case, cases, options, settings, traced=True)


def _step(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = steps.STEP_CASES
    if options.device.type != "cpu":
        cases = (*cases, *networks.at_224(256, 9))
    return _on_networks(
        "step",
        steps.run_step_case,
        cases,
        options,
        settings,
        traced=True,
        samplings=options.samplings,
        faster=options.faster,
        compiled=options.compile,
    )


def _accumulation(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    run, cases = accumulation.run_accumulation_case, accumulation.CASES
    return _on_networks("accumulation", run, cases, options, settings)


def _memory(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = footprint.GPU_CASES
    if options.device.type == "cpu":
        cases = _default(footprint.CPU_CASES, footprint.CPU_DEFAULT, options)
    variants = len(steps.variants(options.sample, settings.dtype))
    return _on_networks(
        "memory", footprint.run_memory_case, cases, options, settings, rounds=variants
    )


def _scaling(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    pattern = registry.compile_filter(options.filter)
    settings = replace(settings, pairs=settings.pairs or scaling.PAIRS)
    for what, value, case in scaling.sweep_cases(options.device.type):
        smallest = value == scaling.SWEEPS[what][0]
        if not pattern.search(f"{what} {case.name}") or (options.quick and not smallest):
            continue

        def run(tick, what=what, value=value, case=case):
            return scaling.run_scaling_case(what, value, case, settings, tick)

        yield Job("scaling", f"{what} {value}", run, settings.pairs)


def _budget(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    pattern = registry.compile_filter(options.filter)
    quick = options.quick and not options.filter
    for case in budget.BUDGET_CASES[:1] if quick else budget.BUDGET_CASES:
        if not pattern.search(case.name):
            continue

        def run(tick, case=case):
            return budget.run_budget_case(
                case, settings, batch=_batch(options), rounds=settings.pairs, tick=tick
            )

        yield Job("budget", case.name, run, settings.pairs or case.rounds)


SUITES: dict[str, Callable[[argparse.Namespace, Settings], Iterator[Job]]] = {
    "kernels": _kernels,
    "update": _update,
    "step": _step,
    "accumulation": _accumulation,
    "memory": _memory,
    "scaling": _scaling,
    "regret": _regret,
    "budget": _budget,
}
