"""``python -m bench long-run``: thousands of steps, of which none may cost more than those before.

A small network, trained in both forms, and with a budget; now and then a batch of another size, an
evaluation, a state_dict. After each window: live tensors and Python objects, the process's memory, CPU
time of a step. It ends with 1 where any of them grows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core import machine
from bench.core.results import save
from bench.core.suite import Suite
from bench.core.table import format_table
from dbp_kernels.tools import timing

STEPS, WINDOWS = 20_000, 20
FORMS = ("attach", "layers", "attach, budget")
# What the last windows may have more than the first ones, as a whole.
OBJECTS, MIB, SLOWER = 200, 4.0, 1.25
EVERY = {"small batch": 10, "evaluation": 50, "state_dict": 100}


class Net(nn.Module):
    """A convolution, two layers fed by the same tensor, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.left, self.right = nn.Linear(36, 8), nn.Linear(36, 8)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(1)
        x = torch.tanh(self.left(x) * self.right(x))
        return self.twice(F.relu(self.twice(x)))


def steps_of(form: str, seed: int = 0) -> Iterator[None]:
    """The training of a form; each ``next()`` is one step."""
    import dbp_kernels as dbp

    kind, _, budget = form.partition(", ")
    options = {"lr": 1e-4, "sample": 0.5, "update_every": 2, "sampling": "random"}
    if budget:  # planned: the same run on every machine
        options |= {"budget": 0.3, "costs": "planned", "update_every": 1}
    torch.manual_seed(seed)
    net = Net() if kind == "attach" else dbp.decorrelate_model(Net())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    if kind == "attach":
        decor = dbp.attach(net, optimizer, **options)
    else:
        decor = dbp.DecorUpdate(net, **options)
    images, targets = torch.randn(16, 2, 8, 8), torch.randn(16, 8)
    for step in itertools.count(1):
        n = 16 if step % EVERY["small batch"] else 5
        optimizer.zero_grad()
        F.mse_loss(net(images[:n]), targets[:n]).backward()
        optimizer.step()
        if kind != "attach":
            decor.step()
        if step % EVERY["evaluation"] == 0:
            with torch.no_grad():
                net.eval()(images)
            net.train()
            decor.losses()
        if step % EVERY["state_dict"] == 0:
            optimizer.state_dict()
            if kind != "attach":
                decor.state_dict()
        yield


def measure(form: str, steps: int = STEPS, windows: int = WINDOWS, seed: int = 0) -> dict:
    """The record of one form: what each window of steps left behind, and took."""
    training, found = steps_of(form, seed), []
    for window in range(1, windows + 1):
        seconds = []
        for _ in range(steps // windows):
            begin = time.thread_time()
            next(training)
            seconds.append(time.thread_time() - begin)
        fast = sorted(seconds)[len(seconds) // 10]  # others use the machine too
        us = round(1e6 * fast, 1)
        found.append({"steps": window * (steps // windows), "us": us, **left()})
    return {"name": form, "windows": found}


def left() -> dict:
    """What there is now, once garbage is collected."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)
    return {"tensors": tensors, "objects": len(objects), "mib": mib}


def growth(record: dict) -> dict:
    """How much more the last half of the windows has than those before, and how much slower it is.

    Without the first window, in which caches fill. The least of each half counts: what leaks stays.
    """
    _, *windows = record["windows"]
    early, late = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    least = {k: [min(w[k] for w in half) for half in (early, late)] for k in windows[0]}
    grown = {k: round(least[k][1] - least[k][0], 2) for k in ("tensors", "objects", "mib")}
    return {**grown, "slower": round(least["us"][1] / least["us"][0], 3)}


def grows(record: dict) -> list[str]:
    """What of it is not constant; empty if all is."""
    found = growth(record)
    limits = {"tensors": 0, "objects": OBJECTS, "mib": MIB, "slower": SLOWER}
    return [
        f"{key}: {found[key]}, at most {limit}"
        for key, limit in limits.items()
        if found[key] > limit
    ]


def table(records: Sequence[dict]) -> str:
    """The records as Markdown."""
    head = [
        "form",
        "steps",
        "us a step",
        "tensors",
        "MiB",
        "more tensors",
        "objects",
        "MiB",
        "slower",
    ]
    rows = []
    for record in records:
        last, grown = record["windows"][-1], growth(record)
        own = [last["steps"], last["us"], last["tensors"], last["mib"], *grown.values()]
        rows.append([record["name"], *map(str, own)])
    return format_table([head, *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (1: something grows)."""
    from dbp_kernels.tools.arguments import positive

    out = argparse.ArgumentParser(prog="python -m bench long-run", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--steps", type=positive, default=STEPS, help=f"default: {STEPS}")
    out.add_argument("--save", type=Path, metavar="PATH", help="write the result, as JSON")
    options = out.parse_args(arguments)
    if options.save and options.save.exists():
        print(f"{options.save} exists and is not overwritten", file=sys.stderr)
        return 2
    with timing.threads(1):
        records = [measure(form, options.steps) for form in FORMS]
    print(table(records))
    if options.save:
        result = {
            "format": 1,
            "command": f"python -m bench long-run --steps {options.steps}",
            "machine": machine.describe("cpu"),
            "settings": {"device": "cpu", "dtype": "float32"},
            "long_run": records,
        }
        save(result, options.save)
        print(f"saved {options.save}")
    bad = [f"{record['name']}: {what}" for record in records for what in grows(record)]
    print("\n".join(bad) or "nothing grows")
    return 1 if bad else 0


SUITE = Suite("Thousands of steps: what the last ones have more than the first", table)
