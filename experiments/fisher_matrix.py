"""The Fisher matrix of a small network, all of it, in float64, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a Fisher matrix's mean eigenvalue: what natural gradient methods add before they invert it.
DAMPING = 1e-3
KINDS = {"model": "the model's Fisher matrix", "empirical": "the empirical Fisher matrix"}
FORMS = {
    "bp": "BP, in A",
    "dbp": "DBP, in W",
    "dbp in A": "DBP's network, in A",
}


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
