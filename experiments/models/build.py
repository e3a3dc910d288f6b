"""Networks by name, as configurations and the command line have them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from experiments.models.airbench import Airbench
from experiments.models.alexnet import AlexNet
from experiments.models.own import build_own
from experiments.models.resnet import ResNet, resnet18, resnet34, resnet50
from experiments.models.resnet9 import ResNet9
from experiments.models.small import MLP, ConvNet
from experiments.models.vae import VAE
from experiments.models.vit import ViT

ImageShape = tuple[int, int, int]

# Images with sides of at least this get the stems and patches made for ImageNet's.
LARGE = 96


def _mlp(
    shape: ImageShape, classes: int, widths: Sequence[int] = (256, 256), batch_norm: bool = True
) -> nn.Module:
    return MLP(shape[0] * shape[1] * shape[2], widths, classes, batch_norm)


def _convnet(
    shape: ImageShape,
    classes: int,
    widths: Sequence[int] = (64, 64, 128),
    batch_norm: bool = True,
    pool_every: int = 1,
    head: str = "flatten",
) -> nn.Module:
    return ConvNet(shape[0], widths, classes, shape[1:], batch_norm, head, pool_every)


def _resnet(build: Callable[[int, int, str], ResNet]) -> Callable[..., nn.Module]:
    def resnet(shape: ImageShape, classes: int, stem: str | None = None) -> nn.Module:
        own = "imagenet" if min(shape[1:]) >= LARGE else "cifar"
        return build(classes, shape[0], stem or own)

    return resnet


def _alexnet(shape: ImageShape, classes: int, dropout: float = 0.5) -> nn.Module:
    if min(shape[1:]) < 63:
        raise ValueError(f"alexnet needs images of at least 63x63, got {shape[1]}x{shape[2]}")
    return AlexNet(classes, shape[0], dropout)


def _resnet9(shape: ImageShape, classes: int, width: int = 64, scale: float = 0.125) -> nn.Module:
    if min(shape[1:]) < 8:
        raise ValueError(f"resnet9 needs images of at least 8x8, got {shape[1]}x{shape[2]}")
    return ResNet9(classes, shape[0], width, scale)


def _airbench(
    shape: ImageShape, classes: int, widths: Sequence[int] = (64, 256, 256), scale: float = 1 / 9
) -> nn.Module:
    if min(shape[1:]) <= 2 ** len(widths):
        size = 2 ** len(widths) + 1
        raise ValueError(
            f"airbench needs images of at least {size}x{size}, got {shape[1]}x{shape[2]}"
        )
    return Airbench(classes, shape[0], widths, scale)


def _vit_s(
    shape: ImageShape,
    classes: int,
    patch: int | None = None,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
) -> nn.Module:
    patch = patch or (16 if min(shape[1:]) >= LARGE else 4)
    return ViT(classes, shape[1:], patch, width, depth, heads, shape[0])


def _vae(
    shape: ImageShape, classes: int, widths: Sequence[int] = (32, 64), latent: int = 20
) -> nn.Module:
    return VAE(shape, widths, latent)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": _mlp,
    "convnet": _convnet,
    "resnet18": _resnet(resnet18),
    "resnet34": _resnet(resnet34),
    "resnet50": _resnet(resnet50),
    "alexnet": _alexnet,
    "resnet9": _resnet9,
    "airbench": _airbench,
    "vit_s": _vit_s,
    "vae": _vae,
}
MODELS = tuple(BUILDERS)

# What a network has that has no such option: saying so is no mistake.
USUAL = {"batch_norm": True, "pool_every": 1}


def build_model(name: str, image_shape: ImageShape, num_classes: int, **options: Any) -> nn.Module:
    """Builds the network called ``name`` for images of shape (channels, height, width).

    Args:
        name: one of ``MODELS``, or "package.module:function" for a function (or class) that returns
            a module: it is called with the options, and with ``image_shape`` and ``num_classes`` if
            it takes them.
        image_shape: (channels, height, width).
        num_classes: number of logits; a vae has none.
        options: of that network; one that is None counts as left out.

            =========  ==================================================================
            mlp        widths (256, 256), batch_norm True
            convnet    widths (64, 64, 128), batch_norm True, pool_every 1, head "flatten"
            resnet*    stem: "imagenet" or "cifar", by default as the images are large
            alexnet    dropout 0.5
            resnet9    width 64, scale 0.125
            airbench   widths (64, 256, 256), scale 1/9
            vit_s      patch: 16 or 4, as the images are large; width 384, depth 12, heads 6
            vae        widths (32, 64), latent 20
            =========  ==================================================================

    Raises:
        ValueError: an unknown name, an option that the network does not have or whose value it
            cannot take, images that it cannot take.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if ":" in name:
        known = {"image_shape": image_shape, "num_classes": num_classes}
        return build_own(name, known, given)
    if name not in BUILDERS:
        known = ", ".join(MODELS)
        raise ValueError(f"model must be one of {known} or package.module:function, got {name!r}")
    takes = list(inspect.signature(BUILDERS[name]).parameters)[2:]
    for key in [key for key in given if key not in takes]:
        value = given.pop(key)
        if USUAL.get(key) != value:
            raise ValueError(f"{name} has no option {key!r} (got {value!r}): expected {takes}")
    return BUILDERS[name](image_shape, num_classes, **given)
