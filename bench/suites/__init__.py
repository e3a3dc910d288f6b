"""Every suite by its name, in the order of reports. A file here owns its run, its table and its plot."""

from __future__ import annotations

import argparse

from bench.core.suite import DTYPES, QUICK_PAIRS, Job, Settings, Suite
from bench.counters import command as counters
from bench.suites import (
    accumulation,
    budget,
    footprint,
    host_time,
    kernels,
    long_run,
    passes,
    regret,
    runs,
    scaling,
    steps,
    updates,
)

SUITES: dict[str, Suite] = {
    "kernels": kernels.SUITE,
    "update": updates.SUITE,
    "step": steps.SUITE,
    "accumulation": accumulation.SUITE,
    "passes": passes.SUITE,
    "memory": footprint.SUITE,
    "scaling": scaling.SUITE,
    "regret": regret.SUITE,
    "budget": budget.SUITE,
    "runs": runs.SUITE,
    "host_time": host_time.SUITE,
    "long_run": long_run.SUITE,
    "counters": counters.SUITE,
}
RUN = tuple(name for name, suite in SUITES.items() if suite.jobs is not None)  # by --suite


def jobs(options: argparse.Namespace) -> list[Job]:
    """Everything that is to be measured. Raises ValueError for a bad --filter."""
    settings = Settings(
        device=options.device,
        dtype=DTYPES[options.dtype],
        pairs=options.pairs or (QUICK_PAIRS if options.quick else None),
        warmup=1 if options.quick else 2,
        channels_last=options.channels_last,
    )
    chosen = [options.suite]
    if options.suite == "all":
        chosen = [name for name in RUN if not SUITES[name].on_request]
    return [job for name in chosen for job in SUITES[name].jobs(options, settings)]
