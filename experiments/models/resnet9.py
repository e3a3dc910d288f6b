"""ResNet-9: CIFAR-10 to 94 % in seconds."""

from __future__ import annotations

from torch import Tensor, nn


def _unit(cin: int, cout: int, *pool: nn.Module) -> nn.Sequential:
    convolution = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pool, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.units = nn.Sequential(_unit(width, width), _unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.units(x)


class ResNet9(nn.Module):
    """The ResNet-9 of Page's "How to train your ResNet" (2018), DAWNBench's on CIFAR-10.

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the first convolution; the others have 2, 4 and 8 times as many.
        scale: of the logits, which without it would be large at the start.

    ``forward`` takes (N, in_channels, height, width), sides of at least 8, usually 32; returns
    (N, num_classes). The max-pools come before batch norm, as in the last of Page's versions: there is
    less to normalise.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, width: int = 64, scale: float = 0.125
    ) -> None:
        super().__init__()
        self.scale = scale
        self.features = nn.Sequential(
            _unit(in_channels, width),
            _unit(width, 2 * width, nn.MaxPool2d(2)),
            _Residual(2 * width),
            _unit(2 * width, 4 * width, nn.MaxPool2d(2)),
            _unit(4 * width, 8 * width, nn.MaxPool2d(2)),
            _Residual(8 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.features(x))
