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
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dbp_kernels as dbp
from experiments.data import Split, load
from experiments.extras import need

# Of a Fisher matrix's mean eigenvalue: what natural gradient methods add before they invert it.
DAMPING = 1e-3
KINDS = {"model": "the model's Fisher matrix", "empirical": "the empirical Fisher matrix"}
FORMS = {
    "bp": "BP, in A",
    "dbp": "DBP, in W",
    "dbp in A": "DBP's network, in A",
}


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


@dataclass(frozen=True)
class Row:
    """One Fisher matrix: a line of ``fisher.csv``.

    Attributes:
        form: one of `FORMS`.
        kind: one of `KINDS`.
        condition: (largest + damping) / (smallest + damping).
        directions: (sum of eigenvalues)^2 / sum of squares: 1 if one direction carries all.
        cosine: between the gradient and the natural gradient, damped alike, in these coordinates.
        loss, accuracy: of the whole training set.
    """

    seed: int
    step: int
    form: str
    kind: str
    condition: float
    directions: float
    largest: float
    cosine: float
    loss: float
    accuracy: float


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


def jacobian(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({parameter: (N, classes, *shape), the logits' derivatives}, logits (N, classes)), float64."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}

    def logits(values: dict[str, Tensor], one: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (one.unsqueeze(0),))
        return result.squeeze(0)

    derivatives = torch.func.vmap(torch.func.jacrev(logits), in_dims=(None, 0))
    model.eval()
    per_image = derivatives(parameters, x.double())
    with torch.no_grad():
        values = torch.func.functional_call(model, parameters, (x.double(),))
    model.train()
    return per_image, values


def in_W(derivatives: dict[str, Tensor], R_of: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Derivatives by A as those by W: d/dW = d/dA R^T."""
    turned = {}
    for name, value in derivatives.items():
        R = R_of(name)
        rows = value.flatten(3) if value.dim() > 3 else value
        turned[name] = value if R is None else (rows @ R.double().mT).reshape(value.shape)
    return turned


def fisher(J: Tensor, logits: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(the Fisher matrix (P, P), the loss's gradient (P,)) of J (N, classes, P)."""
    p = logits.softmax(1)
    residual = p - F.one_hot(y, p.shape[1])
    gradients = torch.einsum("nc,ncp->np", residual, J)
    if kind == "empirical":
        root = gradients
    else:  # J^T (diag p - p p^T) J, as a product of a matrix with itself
        centred = J - torch.einsum("nc,ncp->np", p, J).unsqueeze(1)
        root = (p.sqrt().unsqueeze(2) * centred).flatten(0, 1)
    return root.mT @ root / len(y), gradients.mean(0)


def measure(J: Tensor, logits: Tensor, y: Tensor, kind: str) -> tuple[dict[str, float], Tensor]:
    """(what a `Row` tells of a Fisher matrix, its eigenvalues, largest first)."""
    matrix, gradient = fisher(J, logits, y, kind)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues = eigenvalues.clamp(min=0)
    damping = DAMPING * eigenvalues.mean()
    natural = vectors @ ((vectors.mT @ gradient) / (eigenvalues + damping))
    told = {
        "condition": float((eigenvalues[-1] + damping) / (eigenvalues[0] + damping)),
        "directions": float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()),
        "largest": float(eigenvalues[-1]),
        "cosine": float(F.cosine_similarity(gradient, natural, dim=0)),
    }
    return told, eigenvalues.flip(0)


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
    out.mkdir(parents=True, exist_ok=True)
    with (out / "fisher.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    saved: dict[str, Any] = {"settings": asdict(settings), "damping": DAMPING, "spectra": spectra}
    (out / "spectra.json").write_text(json.dumps(saved) + "\n")
    text = report(rows, settings)
    (out / "report.md").write_text(text)
    draw(rows, spectra, out / "fisher.png")
    return text


def medians(rows: list[Row], form: str, kind: str, value: str) -> dict[int, float]:
    """{step: median over the seeds}."""
    of_step: dict[int, list[float]] = {}
    for row in rows:
        if (row.form, row.kind) == (form, kind):
            of_step.setdefault(row.step, []).append(getattr(row, value))
    return {step: statistics.median(values) for step, values in of_step.items()}


def seeds_agreeing(
    rows: list[Row], kind: str, value: str, better: Callable[[float, float], bool]
) -> int:
    """In how many seeds DBP, in W, is better than BP at the end."""
    last = max(row.step for row in rows)
    found = {
        (row.seed, row.form): getattr(row, value)
        for row in rows
        if row.kind == kind and row.step == last
    }
    seeds = {seed for seed, _ in found}
    return sum(better(found[seed, "dbp"], found[seed, "bp"]) for seed in seeds)


def report(rows: list[Row], settings: Settings) -> str:
    """As Markdown."""
    parameters = sum(p.numel() for p in network(settings.channels).parameters())
    lines = [
        "# Conditioning of the Fisher matrix, with and without DBP",
        "",
        f"Two convolutions and a linear layer, {parameters} parameters, on scikit-learn's digits; SGD at lr "
        f"{settings.lr:g}, batches of {settings.batch_size}; DBP at lr {settings.decor_lr:g}, kappa "
        f"{settings.kappa:g}, sample {settings.sample:g}; seeds {', '.join(map(str, settings.seeds))}. "
        "Medians over the seeds. The condition number and the natural gradient are damped by "
        f"{DAMPING:g} of the mean eigenvalue. Directions: (sum of eigenvalues)^2 / sum of their squares. "
        "Cosine: between the gradient and the natural gradient. Made by "
        "`python -m experiments fisher`; every matrix is a line of fisher.csv.",
        "",
    ]
    seeds = len(settings.seeds)
    for kind, name in KINDS.items():
        lines += [
            f"## {name[0].upper()}{name[1:]}",
            "",
            "| step | form | condition | directions | cosine | loss | accuracy |",
            "|---|---|---|---|---|---|---|",
        ]
        for step in sorted({row.step for row in rows}):
            for form, label in FORMS.items():
                of = {v: medians(rows, form, kind, v)[step] for v in MEASURED}
                lines.append(
                    f"| {step} | {label} | {of['condition']:.3g} | {of['directions']:.3g} | "
                    f"{of['cosine']:.3f} | {of['loss']:.3g} | {of['accuracy']:.1%} |"
                )
        lower = seeds_agreeing(rows, kind, "condition", lambda dbp, bp: dbp < bp)
        nearer = seeds_agreeing(rows, kind, "cosine", lambda dbp, bp: dbp > bp)
        lines += [
            "",
            f"At the end DBP's condition number is the lower in {lower} of {seeds} seeds, and its "
            f"gradient is nearer to the natural one in {nearer} of {seeds}.",
            "",
        ]
    return "\n".join([*lines, "![Condition, directions, cosine and spectra](fisher.png)", ""])


MEASURED = ("condition", "directions", "cosine", "loss", "accuracy")


def draw(rows: list[Row], spectra: dict[str, list[float]], path: Path) -> None:
    """Above: condition and cosine against steps; below: loss, and the spectra of the first seed."""
    need("matplotlib", "matplotlib", "drawing the plot").use("Agg")
    plt = need("matplotlib.pyplot", "matplotlib", "drawing the plot")
    colours = dict(zip(FORMS, ("#D55E00", "#0072B2", "#56B4E9")))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), dpi=130)
    panels = {(0, 0): "condition", (0, 1): "cosine", (1, 0): "loss"}
    for place, value in panels.items():
        axis = axes[place]
        for form, label in FORMS.items():
            kinds = ["model"] if value == "loss" else list(KINDS)
            for kind in kinds:
                of_step = medians(rows, form, kind, value)
                axis.plot(
                    [max(step, 1) for step in of_step],
                    list(of_step.values()),
                    color=colours[form],
                    linestyle="-" if kind == "model" else ":",
                    label=f"{label}" + (", empirical" if kind == "empirical" else ""),
                )
        axis.set(xscale="log", xlabel="step (0 at 1)", ylabel=value)
        if value != "cosine":
            axis.set_yscale("log")
    axes[0, 0].set_ylabel("condition number, damped")
    axes[0, 1].set_ylabel("cosine of gradient and natural gradient")
    axes[1, 0].set_ylabel("training loss")
    for form, label in FORMS.items():
        values = [v for v in spectra[f"{form}, model"] if v > 0]
        largest = values[0]
        axes[1, 1].plot([v / largest for v in values], color=colours[form], label=label)
    axes[1, 1].set(
        yscale="log",
        ylim=(1e-10, 2),
        xlabel="eigenvalue of the model's Fisher matrix, at the end",
        ylabel="over the largest",
    )
    for axis in axes.flat:
        axis.grid(True, color="#E5E5E5", linewidth=0.8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0, 0].legend(fontsize=8, edgecolor="none", framealpha=0.85)
    axes[1, 1].legend(fontsize=8, edgecolor="none", framealpha=0.85)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    assert math.isfinite(rows[-1].loss)
