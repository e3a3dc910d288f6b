"""The small network of "94% on CIFAR-10 in 3.29 seconds on a single GPU"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _unit(cin: int, cout: int, *pool: nn.Module) -> nn.Sequential:
    convolution = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:cin].detach())  # the rest keeps torch's initialisation
    norm = nn.BatchNorm2d(cout, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return nn.Sequential(convolution, *pool, norm, nn.GELU())


class Airbench(nn.Module):
    """The network of airbench94 (Jordan 2024, arXiv 2404.00498), a third of ResNet-9's operations.

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        widths: channels of each group of two convolutions; in front of the second is a max-pool.
        scale: of the logits.
        damping: added to the eigenvalues that `initialise_from` divides by.

    ``forward`` takes (N, in_channels, height, width), sides of at least 9, usually 32; returns
    (N, num_classes). What the first layer's patches of 2x2 are multiplied by is fixed, and by
    `initialise_from` whitens them; without it torch's initialisation stays.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 256, 256),
        scale: float = 1 / 9,
        damping: float = 5e-4,
    ) -> None:
        super().__init__()
        self.scale, self.damping = scale, damping
        self.whiten = nn.Conv2d(in_channels, 8 * in_channels, 2)
        self.whiten.weight.requires_grad_(False)
        groups, channels = [], 8 * in_channels
        for width in widths:
            groups += [_unit(channels, width, nn.MaxPool2d(2)), _unit(width, width)]
            channels = width
        self.groups = nn.Sequential(*groups)
        self.pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes, bias=False)

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Has the first layer whiten patches of 2x2: each eigenvector of their second moments, and its
        opposite, over the square root of its eigenvalue.

        images: (N, in_channels, height, width), as ``forward`` gets them.
        """
        patches = F.unfold(images.float(), 2).transpose(0, 1).flatten(1)  # (D, patches)
        second_moments = patches @ patches.mT / patches.shape[1]
        values, vectors = torch.linalg.eigh(second_moments.double().cpu())
        filters = (vectors / (values + self.damping).sqrt()).mT
        self.whiten.weight.copy_(torch.cat([filters, -filters]).reshape(self.whiten.weight.shape))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whiten(x))
        logits: Tensor = self.scale * self.head(self.pool(self.groups(x)))
        return logits
