"""The command line: one run, studies of many and their pages, the Fisher matrix."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import queue
from experiments.config import RunConfig, parse_yaml
from experiments.pages import make


def setting(text: str) -> tuple[str, Any]:
    """ "optimizer.lr=1e-3" as (key, value); the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return key, parse_yaml(value)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Train by plain and by decorrelated backpropagation, and compare them.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train once, as a YAML file says")
    run.add_argument("config", type=Path, help="the file; experiments/configs/ has some")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="change one value: optimizer.lr=1e-3; may be given several times",
    )
    run.add_argument("--out", type=Path, help="directory (default: a new one under runs/)")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    run.add_argument("--no-progress", action="store_true", help="no progress bar")
    queue.arguments(commands.add_parser("queue", help="make the runs of studies, and their pages"))
    report = commands.add_parser("report", help="make the page of a study again")
    report.add_argument("directory", type=Path, help="of its runs, or of its results")
    fisher = commands.add_parser("fisher", help="condition of the Fisher matrix, BP and DBP")
    fisher.add_argument("--out", type=Path, default=Path("runs/fisher"), help="(runs/fisher)")
    return top


def _run(arguments: argparse.Namespace) -> int:
    from experiments.train import run

    config = RunConfig.from_yaml(arguments.config).override(dict(arguments.set))
    out = arguments.out
    if out is None:
        out = Path("runs") / f"{arguments.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    result = run(config, out, resume=arguments.resume, progress=not arguments.no_progress)
    print(f"{result['status']} after {result['epochs']} epochs, {result['seconds']:.2f} s: {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for bad arguments or missing data (one line on stderr); 3 where runs are left to
    be made; 130 if interrupted."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "run":
            return _run(arguments)
        if arguments.command == "queue":
            return queue.main(arguments)
        if arguments.command == "report":
            print(make(arguments.directory))
        if arguments.command == "fisher":
            from experiments.fisher import Settings, run

            print(run(Settings(), arguments.out))
        return 0
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished epochs are kept, go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
