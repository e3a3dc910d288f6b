"""Initial weights."""

from __future__ import annotations

import math

from torch import nn


def he_initialise(model: nn.Module) -> None:
    """He et al.'s (2015) initialisation for ReLU networks, fan-in form; biases become zero.

    torch's default shrinks the signal from layer to layer in a ReLU network without batch norm. A
    comparison should not credit decorrelation with repairing that.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d):
            # torch takes the outputs for the inputs; of a kernel an output meets 1 / stride per axis
            met = math.prod(module.kernel_size) / math.prod(module.stride)
            fan_in = module.in_channels // module.groups * met
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
