"""Is the Fisher matrix better conditioned under DBP? All of it, exactly, on a network small enough.

    python -m experiments fisher --out experiments/results/fisher

The paper's explanation of DBP is that decorrelated inputs bring gradient descent closer to natural
gradient descent. Here a convolutional network on scikit-learn's digits is trained by plain SGD, with
and without DBP, from the same weights on the same batches; now and then training stands still and the
Fisher matrix over the whole training set is worked out in float64, once as the model's own (labels
as it expects them) and once as the empirical one (labels as they are):

- in the coordinates in which the optimiser makes its step: A for BP, W for DBP (where A = W R);
- for the network that DBP trained, in the coordinates A too, which tells the effect of R from that
  of the other weights that DBP leads to.

Told of each: the spectrum, its condition number with a damping, how many directions carry it, and the
angle between the step's direction and the natural gradient in the same coordinates.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dbp_kernels as dbp
from experiments.data import Split, load
from experiments.environment import environment
from experiments.extras import need
from experiments.fisher_matrix import DAMPING, KINDS, Row, in_W, jacobian, measure
from experiments.fisher_page import draw, report


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, apart from the machine.

    Attributes:
        seeds: each fixes weights and batches, for both methods.
        steps: of SGD without momentum.
        lr, decor_lr, kappa, sample: as for ``dbp.attach`` and its optimiser.
        channels: of the two convolutions.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 1000
    batch_size: int = 64
    lr: float = 0.05
    decor_lr: float = 1e-2
    kappa: float = 0.5
    sample: float = 1.0
    channels: tuple[int, int] = (8, 16)


def network(channels: tuple[int, int]) -> nn.Sequential:
    """Two convolutions and a linear layer for images of 8x8; 1898 parameters with 8 and 16 channels."""
    return nn.Sequential(
        nn.Conv2d(1, channels[0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels[0], channels[1], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels[1], 10),
    )


def times() -> Iterator[int]:
    """After how many steps to look: 0, 10, 30, 100, ..."""
    yield 0
    power = 10
    while True:
        yield from (power, 3 * power)
        power *= 10


def look(
    model: nn.Module, data: Split, R_of: Callable[[str], Tensor | None] | None
) -> Iterator[tuple[str, str, dict[str, float], Tensor]]:
    """(form, kind, what a `Row` tells, eigenvalues) of the network as it is."""
    derivatives, logits = jacobian(model, data.x)
    common = {
        "loss": float(F.cross_entropy(logits, data.y)),
        "accuracy": float((logits.argmax(1) == data.y).double().mean()),
    }
    forms = {"bp": derivatives}
    if R_of is not None:
        forms = {"dbp": in_W(derivatives, R_of), "dbp in A": derivatives}
    for form, own in forms.items():
        J = torch.cat([value.flatten(2) for value in own.values()], 2)
        for kind in KINDS:
            told, eigenvalues = measure(J, logits, data.y, kind)
            yield form, kind, {**told, **common}, eigenvalues


def train(
    settings: Settings, data: Split, seed: int, decorrelate: bool, at: list[int]
) -> Iterator[tuple[Row, Tensor]]:
    """Train one network, and measure its Fisher matrices after each number of steps in ``at``."""
    torch.manual_seed(seed)
    model = network(settings.channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    R_of = None
    if decorrelate:
        decor = dbp.attach(
            model,
            optimizer,
            lr=settings.decor_lr,
            kappa=settings.kappa,
            sample=settings.sample,
        )
        attached = decor.decorrelated()

        def R_of(name: str) -> Tensor | None:
            layer, _, kind = name.rpartition(".")
            return decor.R(layer) if kind == "weight" and layer in attached else None

    order = torch.Generator().manual_seed(seed)
    for step in range(settings.steps + 1):
        if step in at:
            for form, kind, told, eigenvalues in look(model, data, R_of):
                yield Row(seed, step, form, kind, **told), eigenvalues
        chosen = torch.randperm(len(data), generator=order)[: settings.batch_size]
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[chosen]), data.y[chosen]).backward()
        optimizer.step()


def run(settings: Settings, out: Path, progress: bool = True) -> str:
    """All of it. Writes ``fisher.csv``, ``spectra.json``, ``report.md`` and ``fisher.png`` in ``out``.

    Returns the report.
    """
    tqdm = need("tqdm", "tqdm", "the progress bar").tqdm
    begin = time.process_time()
    data = load("digits", "", validation_fraction=0.1).train
    at = [step for step, _ in zip(times(), range(64)) if step <= settings.steps]
    rows: list[Row] = []
    spectra: dict[str, list[float]] = {}
    total = 2 * len(settings.seeds)
    with tqdm(total=total, unit="network", disable=not progress) as bar:
        for seed in settings.seeds:
            for decorrelate in (False, True):
                for row, eigenvalues in train(settings, data, seed, decorrelate, at):
                    rows.append(row)
                    if seed == settings.seeds[0] and row.step == at[-1]:
                        spectra[f"{row.form}, {row.kind}"] = [
                            float(f"{value:.3g}") for value in eigenvalues.tolist()
                        ]
                bar.update()
    cpu = time.process_time() - begin
    out.mkdir(parents=True, exist_ok=True)
    with (out / "fisher.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    saved: dict[str, Any] = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in network(settings.channels).parameters()),
        "damping": DAMPING,
        "cpu_seconds": round(cpu, 1),
        "environment": environment(),
        "spectra": spectra,
    }
    (out / "spectra.json").write_text(json.dumps(saved) + "\n")
    text = report(rows, saved)
    (out / "report.md").write_text(text)
    draw(rows, spectra, out / "fisher.png")
    return text
