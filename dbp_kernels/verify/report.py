"""``python -m dbp_kernels verify``: checks the kernels on this GPU, a table and a file for a bug report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.verify import cases, verdict
from dbp_kernels.verify.verdict import Verdict
from dbp_kernels.verify.workers import PASSED

NOTHING = 2  # exit status where there is nothing to verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--device", type=int, metavar="INDEX", help="of the GPU; default: the current"
    )
    parser.add_argument("--family", choices=cases.FAMILIES, help="default: all that are installed")
    parser.add_argument(
        "--all",
        action="store_true",
        help="all that ships for this GPU, and larger problems: minutes",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="for a bug report; default: in the cache folder"
    )


def main(options: argparse.Namespace) -> int:
    """Checks, prints and writes; 0: all passed, 1: not all did, 2: nothing to verify here."""
    if options.json is not None and options.json.exists():
        print(f"--json {options.json}: the file exists and is not overwritten", file=sys.stderr)
        return NOTHING
    families, reasons = _families(options.family)
    for reason in reasons:
        print(reason, file=sys.stderr)
    if not families:
        return NOTHING
    index = torch.cuda.current_device() if options.device is None else options.device
    if not 0 <= index < torch.cuda.device_count():
        count = torch.cuda.device_count()
        print(f"--device {index}: expected a number below {count}", file=sys.stderr)
        return NOTHING
    verdicts = [_verify(family, index, "all" if options.all else "planned") for family in families]
    print("\n\n".join(map(text, verdicts)))
    try:
        print(f"\nwritten to {_write(verdicts, options.json)}")
    except OSError as error:
        print(f"no file was written, --json FILE says where to: {error}", file=sys.stderr)
    return 0 if all(v.status == PASSED for v in verdicts) else 1


def _families(wanted: str | None) -> tuple[list[str], list[str]]:
    """(families with kernels that run here, why others do not)."""
    if not torch.cuda.is_available():
        return [], ["nothing to verify: no CUDA device is available"]
    found = {f: why for f, why in cases.available("cuda").items() if wanted in (None, f)}
    usable = [family for family, why in found.items() if not why]
    return usable, [f"{family}: nothing to verify: {why}" for family, why in found.items() if why]


def _verify(family: str, index: int, scope: str) -> Verdict:
    """One family, its progress on standard error; what it found is kept for later processes."""
    done = 0

    def tell(record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{family}: {done} checks", end="", file=sys.stderr, flush=True)

    found = verdict.check(family, index, scope, tell, stop_early=False)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if scope == "planned" or found.status == PASSED:  # the planner takes nothing beyond its scope
        verdict.keep(found)
    return found


def text(found: Verdict) -> str:
    """The table of one family: a row for each kernel and precision."""
    rows = [("kernel", "dtype", "configurations", "worst error", "bound", "verdict")]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in found.records:
        groups.setdefault(_kernel(record), []).append(record)
    for (kernel, dtype), records in groups.items():
        errors = [r["error"] for r in records if "error" in r]
        bounds = [r["bound"] for r in records if "bound" in r]
        bad = [r for r in records if r["status"] != PASSED]
        rows.append(
            (
                kernel,
                dtype,
                str(len(records)),
                f"{max(errors):.1e}" if errors else "-",
                f"{max(bounds):.0e}" if bounds else "-",
                f"{bad[0]['status']} ({len(bad)})" if bad else PASSED,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]
    failures = [verdict.told(r) for r in found.records if r["status"] != PASSED]
    head = f"{found.family} on {found.where['device']}, {found.seconds:.0f} s: {found.status}"
    return "\n".join([head, *lines, *failures])


def _kernel(record: dict[str, Any]) -> tuple[str, str]:
    """(kernel, dtype), from the name where the check did not live to say."""
    what, _, _ = record["case"].partition(":")
    return what.split()[1], what.split()[-1]


def _write(verdicts: Sequence[Verdict], path: Path | None) -> Path:
    from dbp_kernels import info

    if path is None:  # named by when, since "x" below overwrites nothing
        path = verdict.folder() / f"report-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": info.environment(), "verdicts": [asdict(v) for v in verdicts]}
    with path.open("x") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    return path
