"""Suite "memory": the most memory that two training steps need, against plain backpropagation.

Counted from before the network is made: weights, gradients, Adam's moments, R, activations, samples
and workspaces. The second step is the first with all of the optimiser's state.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.core.memory import peak_and_live
from bench.core.networks import SMALL, StepCase, at_224, cases_on, jobs_on
from bench.core.plots import ratio_panels
from bench.core.suite import Job, Settings, Suite, failed
from bench.core.table import format_table
from bench.suites.steps import BP, LAYERS, OURS, PUBLISHED, random_images, variants, verdict
from bench.suites.updates import matrices

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


def memory_table(records: Sequence[dict]) -> str:
    """One row a network and variant: megabytes at the peak, and over plain backpropagation's.

    "resident" is what stays between steps: weights, gradients, Adam's moments, R.
    """
    rows = [["network", "variant", "peak MB", "x bp", "peak - bp, MB", "resident MB", "R MB"]]
    for record in records:
        plain = record["methods"].get("bp", {}).get("peak_bytes")
        for name, method in record["methods"].items():
            peak = method.get("peak_bytes")
            row = [record["name"], name, method["status"], "-", "-", "-", "-"]
            if peak is not None:
                row[2] = f"{peak / 1e6:.0f}"
                row[5] = f"{method['resident_bytes'] / 1e6:.0f}"
                if plain:
                    row[3:5] = [f"{peak / plain:.2f}", f"{(peak - plain) / 1e6:.0f}"]
                if name != "bp":
                    row[6] = f"{record['R_bytes'] / 1e6:.0f}"
            rows.append(row)
    return format_table(rows)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    cases = cases_on(options, CPU_CASES, CPU_DEFAULT, GPU_CASES)
    rounds = len(variants(options.sample, settings.dtype))
    return jobs_on("memory", run_memory_case, cases, options, settings, rounds=rounds)


def _peak_ratio(record: dict, variant: str) -> float | None:
    """The variant's peak memory over plain backpropagation's."""
    peaks = [record["methods"].get(name, {}).get("peak_bytes") for name in (variant, BP)]
    return None if None in peaks else peaks[0] / peaks[1]


_LABEL = "peak memory over plain backpropagation's"
SUITE = Suite(
    "peak memory of training",
    memory_table,
    _jobs,
    ratio_panels("memory", _LABEL, _peak_ratio, (OURS, LAYERS, PUBLISHED)),
)
