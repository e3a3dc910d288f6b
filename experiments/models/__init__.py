"""The networks that the experiments and the benchmarks train. Plain torch, unaware of DBP."""

from __future__ import annotations

from experiments.models.airbench import Airbench
from experiments.models.alexnet import AlexNet
from experiments.models.build import MODELS, build_model
from experiments.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50
from experiments.models.resnet9 import ResNet9
from experiments.models.small import MLP, ConvNet
from experiments.models.vae import VAE, negative_elbo, sample
from experiments.models.vit import ViT

__all__ = [
    "MLP",
    "MODELS",
    "VAE",
    "Airbench",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "ConvNet",
    "ResNet",
    "ResNet9",
    "ViT",
    "build_model",
    "negative_elbo",
    "resnet18",
    "resnet34",
    "resnet50",
    "sample",
]
