"""AlexNet."""

from __future__ import annotations

from torch import nn

from experiments.models.initialise import he_initialise


class AlexNet(nn.Sequential):
    """Krizhevsky's (2014) one-tower AlexNet, with torchvision's sizes.

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        dropout: before each of the two hidden linear layers; torchvision's is 0.5.

    Takes (N, in_channels, height, width), sides of at least 63, usually 224; returns
    (N, num_classes).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.0) -> None:
        drop = [nn.Dropout(dropout)] if dropout else []
        super().__init__(
            nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.AdaptiveAvgPool2d(6),  # images of other sizes than 224
            nn.Flatten(),
            *drop,
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            *drop,
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        he_initialise(self)
