"""``python -m bench counters``: what a profiler would count of every kernel, by simulation.

Every shipped kernel and configuration is compiled for sm_80, sm_90 and sm_89, and some blocks of its
real grid run in the PTX simulator: instructions, shared-memory wavefronts, sectors, and the bounds that
they put on its time on an A100, H100 and RTX 4090. No GPU is needed. Bounds are lower ones, not
predictions: latency is not modelled; where not all blocks were run ("simulated" of "grid"), megabytes
and bounds are good to about a tenth. It ends with 1 where a row fails or passes its committed limit.

    python -m bench counters --save                    all of it, to bench/results/counters.json
    python -m bench counters --quick                   each kernel at some sizes, against the limits
    python -m bench counters --kernel reduce --target 90 --against bench/results/counters.json
    python -m bench counters --kernel reduce --write-limits
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.core import machine, registry, results
from bench.core.suite import Suite, failed
from bench.core.table import format_table, short
from bench.counters import cuda_ptx, emulation, limits
from bench.counters.cuda_ptx import simulator
from bench.counters.emulation import Missing
from bench.counters.measure import GPUS, key, record, stand_in
from bench.counters.problems import QUICK_TARGETS, TARGETS, Call, Problem, problems

RESULT = results.RESULTS / "counters.json"


@dataclass(frozen=True)
class Selection:
    """What is asked for; a part that is None leaves nothing out."""

    backend: str | None = None
    kernel: str | None = None
    problem: str | None = None
    targets: tuple[int, ...] = TARGETS
    quick: bool = False

    @property
    def whole(self) -> bool:
        parts = (self.backend, self.kernel, self.problem)
        return not (self.quick or any(parts)) and self.targets == TARGETS

    def jobs(self) -> list[tuple[Problem, int]]:
        """Problems and targets, those of the same compilation together."""
        return [
            (problem, target)
            for target in self.targets
            for problem in problems()
            if self.backend in (None, problem.backend)
            and (self.problem is None or re.search(self.problem, problem.name))
            and target in problem.targets
            and (problem.quick or not self.quick)
        ]

    def counts(self, kernel: str) -> bool:
        """Whether launches of this kernel are asked for."""
        return self.kernel is None or re.fullmatch(self.kernel, kernel) is not None


class Rows:
    """The rows of a problem on one target: of each launch that counts, the first of its kind."""

    def __init__(self, problem: Problem, target: int, selection: Selection):
        self._problem, self._target, self._selection = problem, target, selection
        self._call: Call | None = None
        self._times: Counter[tuple[str, str]] = Counter()
        self._rows: dict[str, dict] = {}

    def run(self) -> list[dict]:
        """Makes the problem's calls. One that raises is a row of its own."""
        with stand_in(self._problem.backend, self._target, self._started):
            self._guarded(self._make_calls)
        return list(self._rows.values())

    def _make_calls(self) -> None:
        for call in self._problem.calls(self._target):
            self._call = call
            self._times.clear()
            self._guarded(call.run)
            if self._selection.quick:
                return

    def _guarded(self, run: Callable[[], object]) -> None:
        try:
            run()
        except Missing:
            raise
        except Exception as failure:
            reason = failed(failure)
            kernel = self._call.kernel if self._call else None
            self._add(kernel or "", "", lambda: reason)

    def _started(self, kernel: str, config: str, make: Callable) -> None:
        self._times[kernel, config] += 1
        times = self._times[kernel, config]
        if self._selection.counts(kernel) and self._call.kernel in (None, kernel):
            config += f" #{times}" * (times > 1)
            self._add(kernel, config, lambda: record(make, self._target))

    def _add(self, kernel: str, config: str, result: Callable[[], dict]) -> None:
        row = {
            "backend": self._problem.backend,
            "kernel": kernel,
            "precision": self._problem.precision,
            "config": config,
            "problem": self._problem.name,
            "target": self._target,
            "chosen": self._call is not None and self._call.kernel is None,
        }
        if key(row) not in self._rows:
            self._rows[key(row)] = {**row, **result()}


# --------------------------------------------------------------------------- tables


def _number(value: float | None) -> str:
    return "-" if value is None else short(value)


def table(rows: Sequence[dict]) -> str:
    """The rows as Markdown, and under it the sums over the launches of each call."""
    head = ["kernel", "", "of", "on", "regs", "instr/MMA (loop)", "wavefronts (loop)", "sectors"]
    lines = [[*head, "read MB", "written", "once", "us >=", "bound by", "of peak"]]
    for row in rows:
        name = [
            f"{row['backend']} {row['kernel']}",
            f"{row['precision']} {row['config']}",
            row["problem"],
            GPUS[row["target"]],
        ]
        if row["status"] != "ok":
            lines.append([*name, row["status"], *["-"] * (len(lines[0]) - 5)])
            continue
        figures = [_number(row[n]) for n in ("sectors", "read_mb", "written_mb", "once_mb", "us")]
        lines.append(
            [
                *name,
                str(row["registers"]),
                _both(row, "instructions_per_mma"),
                _both(row, "wavefronts"),
                *figures,
                row["binding"],
                "-" if row["fraction"] is None else f"{row['fraction']:.0%}",
            ]
        )
    return f"{format_table(lines)}\n\n{_calls(rows)}"


def _both(row: dict, name: str) -> str:
    if row[name] is None:
        return "-"
    return f"{_number(row[name])} ({_number(row[f'loop_{name}'])})"


def _calls(rows: Iterable[dict]) -> str:
    calls: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["chosen"]:
            name = row["backend"], row["precision"], row["problem"], row["target"]
            calls.setdefault(name, []).append(row)
    lines = [["backend", "call", "on", "launches counted", "us >="]]
    for (backend, precision, problem, target), own in calls.items():
        whole = all(row["status"] == "ok" for row in own)
        total = short(sum(row["us"] for row in own)) if whole else "failed"
        launched = ", ".join(row["kernel"] for row in own)
        lines.append([backend, f"{problem} {precision}", GPUS[target], launched, total])
    return format_table(lines)


_COMPARED = (*limits.FIELDS, "fraction")


def comparison(rows: Iterable[dict], before: Iterable[dict]) -> str:
    """What differs from another result's rows, as Markdown; rows of one result alone are named."""
    old = {key(row): row for row in before if row["status"] == "ok"}
    new = {key(row): row for row in rows if row["status"] == "ok"}
    lines = [["row", "figure", "before", "now", "now/before"]]
    for name in new.keys() & old.keys():
        for figure in _COMPARED:
            a, b = old[name][figure], new[name][figure]
            if a != b:
                ratio = f"{b / a:.2f}" if a and b is not None else "-"
                lines.append([name, figure, _number(a), _number(b), ratio])
    lines[1:] = sorted(lines[1:])
    apart = [f"{name}: only now" for name in new.keys() - old.keys()]
    return "\n".join([format_table(lines), *sorted(apart)])


# --------------------------------------------------------------------------- the command


def measure(selection: Selection) -> tuple[list[dict], bool]:
    """(all rows asked for, whether they are all there): an interrupt ends it early."""
    from tqdm import tqdm

    rows: list[dict] = []
    try:
        with tqdm(selection.jobs(), unit="problem", leave=False) as progress:
            for problem, target in progress:
                progress.set_description(f"{problem.backend} {problem.name} sm_{target}")
                rows += Rows(problem, target, selection).run()
    except KeyboardInterrupt:
        return rows, False
    return rows, True


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench counters", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--backend", choices=("cuda", "triton"), help="default: both")
    out.add_argument("--kernel", metavar="REGEX", help='whole names, e.g. reduce, "gram_.*"')
    out.add_argument("--problem", metavar="REGEX", help='e.g. "64@56", "^direct"')
    out.add_argument(
        "--target", type=int, choices=TARGETS, action="append", help="default: all (quick: 80, 90)"
    )
    out.add_argument("--quick", action="store_true", help="some sizes, as the backends choose")
    out.add_argument("--against", type=Path, metavar="FILE", help="a result to compare with")
    out.add_argument("--limits", type=Path, default=limits.FILE, metavar="FILE")
    out.add_argument("--write-limits", action="store_true", help="make these rows the limits")
    out.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=RESULT,
        metavar="PATH",
        help="write the result (default path: bench/results/counters.json)",
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (1: a row failed or passes its limit)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    targets = tuple(options.target or (QUICK_TARGETS if options.quick else TARGETS))
    parts = options.backend, options.kernel, options.problem
    selection = Selection(*parts, targets, options.quick)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.perf_counter()
    try:
        for pattern in (options.kernel, options.problem):
            registry.compile_filter(pattern)
        compared = _rows_of(options.against) if options.against else None
        limited = limits.read(options.limits)
        _ready(selection, options.save)
        rows, complete = measure(selection)
    except (Missing, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print("no launch matches --backend, --kernel, --problem and --target", file=sys.stderr)
        return 2
    print(table(rows))
    if compared is not None:
        print(f"\n{comparison(rows, compared)}")
    whole = selection.whole and complete
    if options.save:
        result = {
            "format": 1,
            "command": shlex.join(["python", "-m", "bench", "counters", *arguments]),
            "started": started,
            "complete": complete,
            "machine": machine.describe("cpu"),
            "settings": {
                "device": "simulator",
                "dtype": "all",
                "whole": whole,
                "compilers": limits.compilers(),
            },
            "took_seconds": round(time.perf_counter() - begin),
            "counters": rows,
        }
        results.save(result, options.save)
        print(f"\nsaved {options.save}")
    if options.write_limits:
        limits.write(rows, options.limits, whole)
        limited = limits.read(options.limits)
    wrong = limits.violations(rows, limited, whole)
    print("\n".join(["", *limits.uncompared(limited), *(wrong or ["all within their limits"])]))
    return 1 if wrong or not complete else 0


def _rows_of(file: Path) -> list[dict]:
    """A saved result's. Raises OSError or ValueError where there are none."""
    result = json.loads(file.read_text())
    if not isinstance(result, dict) or "counters" not in result:
        raise ValueError(f"{file}: not a result that `python -m bench counters --save` wrote")
    return result["counters"]


def _ready(selection: Selection, save: Path | None) -> None:
    """Raises Missing or ValueError where the run would be in vain."""
    from dbp_kernels.backends.triton import runtime

    if save and save.exists():
        raise ValueError(f"{save} exists and is not overwritten")
    simulator()
    if selection.backend != "cuda":
        if importlib.util.find_spec("triton") is None:
            raise Missing("triton is not installed; --backend cuda does without")
        if runtime.INTERPRET:
            raise Missing("TRITON_INTERPRET is set: Triton's kernels would not be compiled")
    if selection.backend != "triton":
        emulation.load()
        cuda_ptx.nvcc()


SUITE = Suite("what every kernel does, counted in a simulator, and lower bounds on its time", table)
