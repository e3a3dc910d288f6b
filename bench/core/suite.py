"""What a suite is: cases that it runs, and how their records show as a table and in a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

CPU = torch.device("cpu")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUICK_BATCH, QUICK_PAIRS = 4, 3


@dataclass(frozen=True)
class Settings:
    """How a suite is run; ``pairs=None`` is each suite's own default.

    With ``replay`` methods are also timed by replays of a CUDA graph. ``profiled``: steps of which a
    breakdown is the median.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    pairs: int | None = None
    warmup: int = 2
    channels_last: bool = False
    replay: bool = False
    profiled: int = 3


class Job(NamedTuple):
    """One case: ``run(tick)`` returns its record and calls ``tick`` about ``rounds`` times."""

    suite: str
    name: str
    run: Callable[[Callable[[], object]], dict]
    rounds: int


class Panel(NamedTuple):
    """A part of a plot: its height in inches, and what draws it into a subfigure of matplotlib."""

    height: float
    draw: Callable[..., object]


def _no_panels(result: dict) -> Iterator[Panel]:
    yield from ()


@dataclass(frozen=True)
class Suite:
    """One entry of ``bench.suites.SUITES``.

    Attributes:
        heading: of its table.
        table: a result's records of this suite as text.
        jobs: (options, settings) -> what is to be measured; None: the suite has a command of its own.
        panels: a whole result -> its part of the plot.
        on_request: left out of ``--suite all``.
    """

    heading: str
    table: Callable[[Sequence[dict]], str]
    jobs: Callable[[argparse.Namespace, Settings], Iterator[Job]] | None = None
    panels: Callable[[dict], Iterator[Panel]] = _no_panels
    on_request: bool = False


def batch_of(options: argparse.Namespace) -> int | None:
    """The batch size that the options ask for; None: each case's own."""
    return options.batch or (QUICK_BATCH if options.quick else None)


def failed(failure: Exception) -> dict:
    """The record of a method that raised."""
    return {"status": "failed", "reason": f"{type(failure).__name__}: {failure}"[:200]}
