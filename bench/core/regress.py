"""``python -m bench check``: has anything become slower? A quick run against the committed results.

Compared are ratios to rivals in the same run, not seconds, so the machine need not be quiet. They
differ from processor to processor: those of this one count where there are any. They vary by 10 to
20 % from run to run here: a case fails when its ratio has fallen below 0.7 of the committed one,
twice in a row. Smaller losses go unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.core import bars, machine, registry
from bench.core.results import RESULTS
from bench.core.table import format_table
from bench.suites.kernels import Settings, run_case
from bench.suites.steps import STEP_CASES, run_step_case
from dbp_kernels.tools.arguments import device

TOLERANCE = 0.7
KERNEL_PAIRS, STEP_PAIRS = 3, 7

Jobs = dict[tuple[str, str], Callable[[], dict]]


@dataclass(frozen=True)
class Comparison:
    """How many times as long as ours a rival took, as committed and now."""

    suite: str
    name: str
    rival: str
    committed: float
    now: float

    @property
    def holds(self) -> bool:
        return self.now >= TOLERANCE * self.committed


def quick_jobs(device: torch.device) -> Jobs:
    """{(suite, case): what measures it}: the registry's core and the smallest network's step."""
    jobs: Jobs = {}
    settings = Settings(device=device, pairs=KERNEL_PAIRS, warmup=1)
    for case in registry.select(tag="core"):
        jobs["kernels", case.name] = lambda case=case: run_case(case, settings)
    network, steps = STEP_CASES[0], Settings(device=device, pairs=STEP_PAIRS, warmup=1)
    jobs["step", network.named()] = lambda: run_step_case(network, steps)
    return jobs


def committed_records(
    folder: Path, device: torch.device, threads: int, processor: str
) -> dict[tuple[str, str], dict]:
    """{(suite, case): its latest committed record} of float32 runs like those of a check.

    The latest on this processor, as `_processor` names it, or else on any.
    """
    found: dict[tuple[str, str], tuple[tuple[bool, str], dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        settings = result.get("settings", {})
        alike = (settings.get("device"), settings.get("dtype")) == (device.type, "float32")
        alike = alike and not settings.get("channels_last")
        if not alike or (device.type == "cpu" and result["machine"]["threads"] != threads):
            continue
        rank = _processor(result["machine"]) == processor, result["started"]
        for suite in ("kernels", "step"):
            for record in result.get(suite, ()):
                if record.get("sample", bars.SAMPLE) != bars.SAMPLE:
                    continue
                key = suite, record["name"]
                if key not in found or found[key][0] < rank:
                    found[key] = rank, record
    return {key: record for key, (_, record) in found.items()}


def _processor(described: dict) -> str:
    """The GPU's or the CPU's name, of a description as in result files."""
    return described.get("gpu") or described["cpu"]


def compare(suite: str, committed: dict, now: dict) -> Iterator[Comparison]:
    """With every rival of the committed record that was measured both times."""
    for rival in committed["methods"]:
        before, after = (bars.speedup(record, rival) for record in (committed, now))
        if rival != bars.OURS and before is not None and after is not None:
            yield Comparison(suite, now["name"], rival, before, after)


def check(
    jobs: Jobs, committed: dict[tuple[str, str], dict], say: Callable[[str], object]
) -> tuple[list[Comparison], list[str]]:
    """(every comparison, what failed): cases that fall short are measured a second time."""
    comparisons: list[Comparison] = []
    failures: list[str] = []
    for key, measure in jobs.items():
        if key not in committed:
            continue
        for attempt in ("", " again"):
            say(f"{key[1]}{attempt}")
            record = measure()
            ours = record["methods"][bars.OURS]
            found = list(compare(key[0], committed[key], record))
            if ours["status"] != "ok" or all(c.holds for c in found):
                break
        comparisons += found
        if ours["status"] != "ok":
            failures.append(f"{key[1]}: {ours['status']}: {ours['reason']}")
        failures += [
            f"{c.name}: {c.rival} took {c.now:.2f} times as long as ours, {c.committed:.2f} as "
            f"committed: below {TOLERANCE:g} of it in two runs"
            for c in found
            if not c.holds
        ]
    return comparisons, failures


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 1 if something has become slower."""
    out = argparse.ArgumentParser(prog="python -m bench check", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--device", default=torch.device("cpu"), type=device, help="default: cpu")
    out.add_argument("--results", type=Path, default=RESULTS, help="folder of committed results")
    options = out.parse_args(arguments)
    jobs = quick_jobs(options.device)
    threads = torch.get_num_threads()
    processor = _processor(machine.describe(options.device))
    committed = committed_records(options.results, options.device, threads, processor)
    if not jobs.keys() & committed.keys():
        print(
            f"{options.results}: no result to compare with for {options.device.type}, float32, "
            f"{threads} threads",
            file=sys.stderr,
        )
        return 2
    print(f"{processor}, {threads} threads", flush=True)
    comparisons, failures = check(jobs, committed, lambda text: print(text, flush=True))
    rows = [["suite", "case", "rival", "committed x", "now x", "now/committed", ""]]
    rows += [
        [
            c.suite,
            c.name,
            c.rival,
            f"{c.committed:.2f}",
            f"{c.now:.2f}",
            f"{c.now / c.committed:.2f}",
            "" if c.holds else "SLOWER",
        ]
        for c in comparisons
    ]
    print(f"\n{format_table(rows)}\n")
    for name in sorted(name for suite, name in jobs.keys() - committed.keys()):
        print(f"{name}: nothing committed")
    print("\n".join(failures) or f"nothing fell below {TOLERANCE:g} of the committed ratio")
    return 1 if failures else 0
