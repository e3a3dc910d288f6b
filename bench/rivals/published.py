"""The published algorithm (arXiv 2405.02385) as a straightforward baseline for whole steps.

The condensed weight A = W R is formed once per forward pass; for the statistics R itself is
applied, as a convolution with D output channels, to a random sample of whole images; then
C = Y^T Y / n and R <- R - lr [(1 - kappa) C_off + kappa V] R. Against the authors' code, mended
without a change of cost: V scales the rows of R, the bias is added, the statistics keep no autograd
graph, and nothing is read back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Decorrelated(nn.Module):
    """What the layers share: R and its update."""

    R: Tensor

    def __init__(self, D: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("R", torch.eye(D, device=like.device, dtype=like.dtype))
        self.seen: Tensor | None = None

    def decorrelated(self, images: Tensor) -> Tensor:
        """(n, D): R z for every patch z of the images."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, lr: float, kappa: float, sample: float) -> Tensor:
        """One update from a random ``sample`` of the images last seen; returns the 0-d loss."""
        seen, self.seen = self.seen, None
        if seen is None:
            raise RuntimeError("update() needs a forward pass in training mode before it")
        count = max(1, round(sample * seen.shape[0]))
        if count < seen.shape[0]:
            seen = seen[torch.randperm(seen.shape[0], device=seen.device)[:count]]
        y = self.decorrelated(seen.to(self.R.dtype))  # half-precision activations: R stays as it is
        c = y.t() @ y / y.shape[0]
        v = c.diagonal() - 1
        update = (1 - kappa) * c
        update.diagonal().copy_(kappa * v)
        loss = (1 - kappa) * (c.square().sum() - c.diagonal().square().sum())
        loss = (loss + kappa * v.square().sum()) / c.numel()
        self.R -= lr * (update @ self.R)
        return loss


class PublishedConv2d(_Decorrelated):
    """Takes over a plain ``nn.Conv2d`` (groups = 1, zero padding), keeping its parameters."""

    def __init__(self, layer: nn.Conv2d) -> None:
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise ValueError(f"expected groups=1 and zero padding, got {layer}")
        super().__init__(layer.weight[0].numel(), layer.weight)
        self.weight, self.bias = layer.weight, layer.bias
        self.window = (layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = x.detach()
        condensed = (self.weight.flatten(1) @ self.R).view_as(self.weight)
        return F.conv2d(x, condensed, self.bias, *self.window)

    def decorrelated(self, images: Tensor) -> Tensor:
        y = F.conv2d(images, self.R.view(-1, *self.weight.shape[1:]), None, *self.window)
        return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


class PublishedLinear(_Decorrelated):
    """Takes over a plain ``nn.Linear``, keeping its parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.weight)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = x.detach()
        return F.linear(x, self.weight @ self.R, self.bias)

    def decorrelated(self, images: Tensor) -> Tensor:
        return F.linear(images, self.R).flatten(0, -2)


def publish_model(model: nn.Module) -> nn.Module:
    """Swaps every plain ``Conv2d`` and ``Linear`` of ``model`` in place; returns the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                setattr(parent, name, PublishedConv2d(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, PublishedLinear(child))
    return model


def publish_update(
    model: nn.Module, lr: float = 1e-5, kappa: float = 0.5, sample: float = 0.1
) -> list[Tensor]:
    """Updates R of every swapped layer; returns their decorrelation losses (0-d tensors)."""
    layers = [module for module in model.modules() if isinstance(module, _Decorrelated)]
    return [layer.update(lr, kappa, sample) for layer in layers]
