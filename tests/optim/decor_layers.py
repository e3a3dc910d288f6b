"""Decorrelated layers of every kind, and what the paper makes of their R."""

import copy

import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

D64 = torch.float64


def patches(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(groups, n, D): the layer's patches, from the definition."""
    if isinstance(layer, dnn.Decorrelate):
        return x.reshape(1, -1, layer.num_features)
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.ConvTranspose2d):
        rows = x.movedim(1, -1).reshape(-1, layer.groups, x.shape[1] // layer.groups)
        return rows.transpose(0, 1)
    dims = len(layer.kernel_size)
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, pads, mode=mode)
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.movedim(1, 1 + dims)  # (N, *output, C, *kernel)
    size = layer.weight[0].numel()
    return x.reshape(-1, layer.groups, size).transpose(0, 1)


def expected(
    Z: torch.Tensor, R: torch.Tensor, lr: float, kappa: float, rule="standard", demean=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_new and loss by the formulas of the paper, from patches (groups, n, D)."""
    shape, R = R.shape, R.reshape(-1, *R.shape[-2:]).to(D64)
    Z = Z.to(D64)
    results, losses = [], []
    for z, r in zip(Z, R):
        if demean:
            z = z - z.mean(0)
        x = z @ r.T
        size = r.shape[0]
        M = x.T @ x / len(x)
        C = M - M.diag().diag()
        v = M.diag() - 1
        if rule == "standard":
            step = (1 - kappa) * C + kappa * v.diag()
            losses.append(((1 - kappa) * C.square().sum() + kappa * v.square().sum()) / size**2)
        else:
            weight = (1 - kappa) / (size - 1) if size > 1 else 0.0
            step = weight * C + 2 * kappa * v.diag()
            losses.append((weight * C.square().sum() + kappa * v.square().sum()) / size)
        results.append(r - lr * step @ r)
    return torch.stack(results).reshape(shape), torch.stack(losses).mean()


LAYERS = [
    (dnn.DecorLinear(5, 4), (8, 5)),
    (dnn.DecorLinear(5, 4), (8, 3, 5)),
    (dnn.DecorConv1d(4, 6, 3, stride=2, padding=2, dilation=2), (8, 4, 11)),
    (dnn.DecorConv2d(2, 4, 3), (8, 2, 6, 7)),
    (dnn.DecorConv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (8, 4, 7, 6)),
    (dnn.DecorConv2d(2, 4, (2, 3), padding="same", padding_mode="reflect"), (8, 2, 5, 6)),
    (dnn.DecorConv2d(3, 3, 3, groups=3, padding="same"), (8, 3, 5, 6)),
    (dnn.DecorConv3d(2, 4, 2, padding=1, padding_mode="circular"), (8, 2, 3, 4, 3)),
    (dnn.DecorConvTranspose2d(6, 4, 3, stride=2, groups=2), (8, 6, 4, 3)),
    (dnn.Decorrelate(12), (8, 3, 2, 2)),
]


def fresh(layer: nn.Module, dtype=D64) -> nn.Module:
    layer = copy.deepcopy(layer).to(dtype)
    layer.R.add_(torch.randn_like(layer.R) * 0.1)
    return layer


def samples_of(update: dbp.DecorUpdate) -> list[list[torch.Tensor]]:
    return [r.samples for group in update._recorders for r in group]
