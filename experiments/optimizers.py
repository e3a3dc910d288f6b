"""The optimisers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from experiments.config import OptimizerConfig


def build(config: OptimizerConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """All the optimisers that a step of the named one consists of.

    ``config.options``: "sgd" ``nesterov`` (False); "adam", "adamw" ``betas``, ``eps``.
    Weight decay is that of the optimiser: coupled to the gradient but for "adamw".

    Raises ValueError for an unknown name or option.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        own = _options(config, nesterov=False)
        return [torch.optim.SGD(parameters, momentum=config.momentum, **common, **own)]
    if config.name in ("adam", "adamw"):
        kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        own = _options(config, betas=(0.9, 0.999), eps=1e-8)
        return [kind(parameters, **common, **own)]
    raise ValueError(f"optimizer.name is {config.name!r}: expected one of sgd, adam, adamw")


def _options(config: OptimizerConfig, **defaults: Any) -> dict[str, Any]:
    """The options with their defaults."""
    for name, value in config.options.items():
        if name not in defaults:
            raise ValueError(
                f"optimizer.options.{name} is {value!r}: expected one of {list(defaults)} for "
                f"{config.name}"
            )
    return {**defaults, **config.options}
