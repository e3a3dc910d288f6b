"""Small networks: fully connected, and a VGG of a few convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from experiments.models.initialise import he_initialise


class MLP(nn.Module):
    """Flattened image -> hidden linear layers with ReLU -> linear head.

    Args:
        in_features: number of pixels times channels.
        hidden: width of each hidden layer.
        num_classes: number of logits.
        batch_norm: put a ``BatchNorm1d`` between each hidden linear layer and its ReLU.

    ``forward`` takes (N, ...) with ``in_features`` values per sample and returns (N, num_classes).
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (256, 256),
        num_classes: int = 10,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(next_width))
            layers.append(nn.ReLU(inplace=True))
            width = next_width
        layers.append(nn.Linear(width, num_classes))
        self.layers = nn.Sequential(*layers)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet(nn.Module):
    """A small VGG: [3x3 convolution, (batch norm), ReLU, (max-pool 2)] x len(widths), linear head.

    Args:
        in_channels: channels of the image.
        widths: output channels of each convolution.
        num_classes: number of logits.
        image_size: side (or (height, width)) of the image; needed for the flattened head.
        batch_norm: batch norm after each convolution, whose bias is then left out.
        head: "flatten" or "global" (average over all positions before the linear head).
        pool_every: a max-pool after every so many convolutions.

    A max-pool is left out once the feature map has a side of one pixel, so that 8x8, 28x28 and
    32x32 images all work.
    ``forward`` takes (N, in_channels, height, width) and returns (N, num_classes).
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 64, 128),
        num_classes: int = 10,
        image_size: int | tuple[int, int] = 32,
        batch_norm: bool = True,
        head: str = "flatten",
        pool_every: int = 1,
    ) -> None:
        super().__init__()
        if pool_every < 1:
            raise ValueError(f"pool_every must be at least 1, got {pool_every!r}")
        if head not in ("flatten", "global"):
            raise ValueError(f"head must be 'flatten' or 'global', got {head!r}")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        layers: list[nn.Module] = []
        channels = in_channels
        for number, out_channels in enumerate(widths, start=1):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            if number % pool_every == 0 and min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            channels = out_channels
        if head == "global":
            layers.append(nn.AdaptiveAvgPool2d(1))
            height = width = 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * width, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
