"""The networks that the experiments and the benchmarks train. Plain torch, unaware of DBP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MODELS = ("mlp", "convnet", "resnet18")


def he_initialise(model: nn.Module) -> None:
    """He et al.'s (2015) initialisation for ReLU networks, fan-in form; biases become zero.

    torch's default shrinks the signal from layer to layer in a ReLU network without batch norm. A
    comparison should not credit decorrelation with repairing that.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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


def _conv3x3(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)


def _conv1x1(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, cin: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(cin, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 and a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, cin: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv1x1(cin, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)


class ResNet(nn.Module):
    """ResNet (He et al. 2015) with torchvision's module and parameter names.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: number of blocks in each of the four stages.
        num_classes: number of logits.
        in_channels: channels of the image.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool).

    With the "imagenet" stem a torchvision checkpoint of the same depth loads as it is.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        elif stem == "cifar":
            self.conv1 = _conv3x3(in_channels, 64)
        else:
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self._cin = 64
        self.layer1 = self._stage(block, 64, layers[0], 1)
        self.layer2 = self._stage(block, 128, layers[1], 2)
        self.layer3 = self._stage(block, 256, layers[2], 2)
        self.layer4 = self._stage(block, 512, layers[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int, stride: int
    ) -> nn.Sequential:
        cout = planes * block.expansion
        downsample = None
        if stride != 1 or self._cin != cout:
            downsample = nn.Sequential(_conv1x1(self._cin, cout, stride), nn.BatchNorm2d(cout))
        blocks = [block(self._cin, planes, stride, downsample)]
        self._cin = cout
        blocks += [block(cout, planes, 1, None) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3, stem: str = "imagenet") -> ResNet:
    """ResNet-18; ``stem="cifar"`` for images of about 32x32."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, stem)


def resnet34(num_classes: int = 1000, in_channels: int = 3, stem: str = "imagenet") -> ResNet:
    """ResNet-34; ``stem="cifar"`` for images of about 32x32."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, stem)


def resnet50(num_classes: int = 1000, in_channels: int = 3, stem: str = "imagenet") -> ResNet:
    """ResNet-50 (stride in the 3x3, as torchvision); ``stem="cifar"`` for images of about 32x32."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, stem)


def build_model(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    batch_norm: bool = True,
    widths: Sequence[int] | None = None,
    pool_every: int = 1,
) -> nn.Module:
    """Builds the network called ``name`` for images of shape (channels, height, width).

    ``widths`` are the convnet's channels or the mlp's hidden widths (``None``: the class's
    default); ``pool_every`` concerns the convnet alone. ResNet has fixed widths and always has
    batch norm; asking it for anything else raises ValueError, as an unknown name does.
    """
    channels, height, width = image_shape
    builders: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP(
            math.prod(image_shape), widths or (256, 256), num_classes, batch_norm=batch_norm
        ),
        "convnet": lambda: ConvNet(
            channels,
            widths or (64, 64, 128),
            num_classes,
            (height, width),
            batch_norm,
            pool_every=pool_every,
        ),
        "resnet18": lambda: resnet18(
            num_classes, channels, "imagenet" if min(height, width) >= 96 else "cifar"
        ),
    }
    if name not in builders:
        raise ValueError(f"model must be one of {', '.join(builders)}, got {name!r}")
    if name == "resnet18" and (widths or not batch_norm):
        raise ValueError("resnet18 has fixed widths and batch norm: leave out widths/no-batch-norm")
    return builders[name]()
