"""The command line: ``python -m experiments train`` and ``python -m experiments report DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.configs import PRESETS, Config
from experiments.data import DATASETS
from experiments.models import MODELS
from experiments.results import read_config


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated {kind.__name__} list"
    return parse


def seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" is a list, "3" a count (0, 1, 2); a list of one seed is written "3,"."""
    if "," in text:
        return tuple(int(part) for part in text.split(",") if part.strip())
    return tuple(range(int(text)))


def sample(text: str) -> float | int:
    """ "0.1" is a fraction of the batch, "6" a number of images."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Compare plain (BP) and decorrelated (DBP) backpropagation on real images.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a grid of runs and report")
    # Defaults stay unset here, so that a preset's values can be told from what was asked for.
    add = train.add_argument
    floats, ints = _list_of(float), _list_of(int)
    add("--preset", choices=sorted(PRESETS), help="a fixed comparison; other options override it")
    add("--method", dest="methods", type=_list_of(str), help="bp, dbp or bp,dbp (default)")
    add("--model", choices=MODELS)
    add("--data", choices=DATASETS)
    add("--data-dir", help="folder of train-*.parquet and test-*.parquet (default: data)")
    add("--seeds", type=seeds, help="a list such as 0,1,2, or a count such as 3 (default 3)")
    add("--epochs", type=int)
    add("--lr", type=floats, help="learning rates of both methods, comma-separated")
    add("--lr-bp", type=floats, help="learning rates of bp (goes before --lr)")
    add("--lr-dbp", type=floats, help="learning rates of dbp (goes before --lr)")
    add("--decor-lr", type=floats, help="learning rates of R, each tried with each of dbp's")
    add("--kappa", type=float, help="0: decorrelate only, 1: unit variance only")
    add("--sample", type=sample, help="images for the statistics: fraction 0.1 or count 6")
    add("--update-every", type=int, help="steps between two updates of R")
    add("--rule", choices=("standard", "normalized"))
    add("--demean", action=argparse.BooleanOptionalAction, default=None)
    add("--batch-size", type=int)
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=None)
    add("--widths", type=ints, help="channels of the convnet, hidden widths of the mlp")
    add("--pool-every", type=int, help="a max-pool after every so many convolutions (default 1)")
    add("--train-size", type=int, help="only the first so many training images")
    add("--test-size", type=int, help="only the first so many test images")
    add("--validation-fraction", type=float, help="share of training images for choosing lr")
    add("--threads", type=int, help="CPU threads")
    add("--device", help="cpu (default) or cuda")
    add("--amp", choices=("bf16",), help="autocast")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=None)
    add("--out", type=Path, help="results directory (default: a new one under runs/)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace earlier results")
    existing.add_argument("--resume", action="store_true", help="skip runs that are finished")
    add("--no-progress", action="store_true", help="no progress bar")
    report = commands.add_parser("report", help="rebuild summary.md and curves.png")
    report.add_argument("directory", type=Path)
    fisher = commands.add_parser("fisher", help="condition of the Fisher matrix, BP and DBP")
    fisher.add_argument("--out", type=Path, default=Path("runs/fisher"))
    return top


def config_from(arguments: argparse.Namespace) -> Config:
    """Preset, then options. Raises ValueError for values that make no sense."""
    given = {k: v for k, v in vars(arguments).items() if v is not None}
    values = dict(PRESETS[given["preset"]]) if "preset" in given else {}
    if "lr" in given:
        values["lr_bp"] = values["lr_dbp"] = given["lr"]
    names = set(Config.__dataclass_fields__)
    return Config(**{**values, **{k: v for k, v in given.items() if k in names}})


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for bad arguments or missing data (one line on stderr); 130 if interrupted."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "report":
            from experiments.runner import write_report

            read_config(arguments.directory)
            print(write_report(arguments.directory))
            return 0
        if arguments.command == "fisher":
            from experiments.fisher import Settings, run

            print(run(Settings(), arguments.out))
            return 0
        from experiments.runner import run_comparison

        config = config_from(arguments)
        out = arguments.out
        if out is None:
            name = arguments.preset or f"{config.model}-{config.data}"
            out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        print(
            run_comparison(
                config,
                out,
                overwrite=arguments.overwrite,
                resume=arguments.resume,
                progress=not arguments.no_progress,
            )
        )
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished epochs are kept, go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
