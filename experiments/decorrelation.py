"""DBP on a run's optimisers, and the controls whose R stands still."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dbp_kernels as dbp
from dbp_kernels.optim.kinds import Patches, patches_of
from experiments.config import DecorConfig


def attach(
    config: DecorConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seed: int
) -> dbp.Attached | dbp.DecorUpdate:
    """``seed`` is that of the random orthogonal R, nothing else. Raises as ``dbp.attach``.

    A ``DecorUpdate``, for whole feature maps, is to make a step after the optimisers have.
    """
    if config.mode == "features":
        taken = inspect.signature(dbp.DecorUpdate).parameters
        options = config.attach_options().items()
        given = {key: value for key, value in options if key in taken}
        given["cuda_graph"] = bool(given["cuda_graph"])  # None: as attach thinks best
        return dbp.DecorUpdate(model, **given)
    decor = dbp.attach(model, optimizers, **config.attach_options())
    if config.mode == "orthogonal":
        generator = torch.Generator().manual_seed(seed)
        modules = {name or type(m).__name__: m for name, m in model.named_modules()}
        for optimizer in optimizers:
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                for name, layer in (group.get("dbp") or {"layers": {}})["layers"].items():
                    patches = patches_of(modules[name])
                    assert isinstance(patches, Patches)  # else it were not attached
                    rotate(layer["W"], layer["R"], patches.transposed, generator)
            optimizer.load_state_dict(state)
    return decor


def rotate(W: Tensor, R: Tensor, transposed: bool, generator: torch.Generator) -> None:
    """R = I becomes a random orthogonal Q and W becomes W Q^T, in place: A = W R stays what it is.

    Args:
        W: (groups * out, ...) of D entries a row, or (groups * D, ...) if transposed.
        R: (D, D), or (groups, D, D) with groups > 1.
    """
    Q = orthogonal(R.shape, generator).to(R)
    R.copy_(Q)
    D = R.shape[-1]
    groups = R.numel() // D**2
    if transposed:
        rotated = Q @ W.reshape(groups, D, -1).to(Q)
    else:
        rotated = W.reshape(groups, -1, D).to(Q) @ Q.mT
    W.copy_(rotated.reshape(W.shape))


def orthogonal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Orthogonal matrices (..., D, D) from the uniform (Haar) distribution, float64."""
    Q, upper = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))
    signs: Tensor = torch.diagonal(upper, dim1=-2, dim2=-1).sign()
    return signs.unsqueeze(-2) * Q
