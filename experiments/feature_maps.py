"""Decorrelation of whole feature maps, which patches are compared with: ``experiments.feature_maps:convnet``.

In front of every layer stands ``dbp.nn.Decorrelate`` with an R of all that the layer's input holds,
channels and places alike, in place of an R of one patch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import dbp_kernels as dbp
from experiments.models import build_model

LAYERS = (nn.Conv2d, nn.Linear)


def convnet(image_shape: tuple[int, int, int], num_classes: int, **options: Any) -> nn.Module:
    """The network "convnet" with the same options and weights, and with ``decor.mode: features``."""
    model = build_model("convnet", image_shape, num_classes, **options)
    return decorrelate_feature_maps(model, image_shape)


def decorrelate_feature_maps(model: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """Puts ``Decorrelate`` in front of every layer of a model, which it returns, in place."""
    features: dict[nn.Module, int] = {}

    def see(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        features[layer] = math.prod(arguments[0].shape[1:])

    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *image_shape))
    model.train(training)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in features:
                pair = nn.Sequential(dbp.nn.Decorrelate(features[child]), child)
                parent.register_module(name, pair)
    return model
