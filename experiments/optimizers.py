"""The optimisers by name, with DBP and FOOF's preconditioner where they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.optim.kinds import Patches, patches_of
from experiments import decorrelation
from experiments.config import OptimizerConfig, RunConfig
from experiments.foof import Foof
from experiments.muon import Muon

# Each name's options with their defaults.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_SGD = {"nesterov": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": _SGD,
    "adam": _ADAM,
    "adamw": _ADAM,
    # head: the layers that AdamW takes, by default the last one
    "muon": {
        "nesterov": True,
        "adjust": "original",
        "head": None,
        "adamw_lr": 1e-3,
        "adamw_weight_decay": 0.0,
    },
    "foof": {"base": "sgd", "damping": 1e-2, "decay": 0.95, "every": 10, "sample": 1.0},
}


class Optimizers:
    """What a step of the named optimiser consists of.

    Weight decay is the optimiser's own: added to the gradient by "sgd" and "adam", decoupled in
    "adamw" and "muon". "muon" takes the weights of layers, and AdamW what is no such weight, and the
    head. "foof" is SGD, or its option ``base``, whose options it takes as well.

    Attributes:
        all: torch's optimisers, in the order in which they step.
        decor: what ``dbp.attach`` has returned, or a ``DecorUpdate``.

    Raises ValueError for unknown names and options.
    """

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        name, options = config.optimizer.name, _options(config.optimizer)
        own = dict(options)
        foof = None
        if name == "foof":
            foof = {key: own.pop(key) for key in OPTIONS["foof"] if key != "base"}
            name = own.pop("base")
        self.all = _MAKE[name](config.optimizer, model, own)
        self.decor: dbp.Attached | dbp.DecorUpdate | None = None
        if config.decor is not None:
            self.decor = decorrelation.attach(config.decor, model, self.all, config.seed)
        # last: what DBP makes of the gradients is what it preconditions
        attached = self.decor if isinstance(self.decor, dbp.Attached) else None
        self.foof = None if foof is None else Foof(model, self.all[0], **foof, decor=attached)
        self._follow_lr = config.decor is not None and config.decor.follow_lr
        self._highest = 0.0  # of the factors so far
        # steps after which their work repeats, as far as it is regular
        self.period = max(
            1 if config.decor is None else config.decor.update_every,
            1 if self.foof is None else self.foof.every,
        )
        for group in self.groups():
            group["initial_lr"] = group["lr"]

    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups, which ``load_state_dict`` makes anew."""
        return [group for optimizer in self.all for group in optimizer.param_groups]

    def step(self, factor: float) -> None:
        """``factor``: what multiplies all learning rates now."""
        for group in self.groups():
            group["lr"] = group["initial_lr"] * factor
        for optimizer in self.all:
            optimizer.step()
        if isinstance(self.decor, dbp.DecorUpdate):  # attach does so itself
            self._highest = max(self._highest, factor)
            share = factor / self._highest if self._follow_lr else 1.0
            for group in self.decor.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
            self.decor.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        states = [optimizer.state_dict() for optimizer in self.all]
        decor = self.decor.state_dict() if isinstance(self.decor, dbp.DecorUpdate) else None
        return {
            "all": states,
            "foof": self.foof and self.foof.state_dict(),
            "decor": decor,
            "highest": self._highest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, its in zip(self.all, state["all"], strict=True):
            optimizer.load_state_dict(its)
        self._highest = state["highest"]
        if isinstance(self.decor, dbp.DecorUpdate):
            self.decor.load_state_dict(state["decor"])
        if self.foof is not None:
            self.foof.load_state_dict(state["foof"])


def _options(config: OptimizerConfig) -> dict[str, Any]:
    """The options with their defaults."""
    if config.name not in OPTIONS:
        raise ValueError(f"optimizer.name is {config.name!r}: expected one of {', '.join(OPTIONS)}")
    options = OPTIONS[config.name]
    if config.name == "foof":
        base = config.options.get("base", "sgd")
        if base not in ("sgd", "adam", "adamw"):
            raise ValueError(f"optimizer.options.base is {base!r}: expected sgd, adam or adamw")
        options = {**OPTIONS[base], **options}
    for name, value in config.options.items():
        if name not in options:
            raise ValueError(
                f"optimizer.options.{name} is {value!r}: expected one of {list(options)}"
            )
    return {**options, **config.options}


def _plain(
    kind: type[torch.optim.Optimizer],
    config: OptimizerConfig,
    model: nn.Module,
    options: dict[str, Any],
) -> list[torch.optim.Optimizer]:
    if kind is torch.optim.SGD:
        options = {**options, "momentum": config.momentum}
    values: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **options}
    return [kind(_trained(model), **values)]


def _muon(
    config: OptimizerConfig, model: nn.Module, options: dict[str, Any]
) -> list[torch.optim.Optimizer]:
    weights = {}
    for name, module in model.named_modules():
        patches = patches_of(module)
        if isinstance(patches, Patches):
            weights[name] = module._parameters[patches.weight]
    head = options["head"] if options["head"] is not None else list(weights)[-1:]
    for name in head:
        if name not in weights:
            raise ValueError(
                f"optimizer.options.head has {name!r}: expected some of {list(weights)}"
            )
    hidden = [
        w for name, w in weights.items() if name not in head and w is not None and w.requires_grad
    ]
    taken = {id(w) for w in hidden}
    rest = [p for p in _trained(model) if id(p) not in taken]
    if not hidden:
        raise ValueError("optimizer.name is 'muon': expected a model with layers besides its head")
    return [
        Muon(
            hidden,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=options["nesterov"],
            adjust=options["adjust"],
        ),
        torch.optim.AdamW(rest, lr=options["adamw_lr"], weight_decay=options["adamw_weight_decay"]),
    ]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


_MAKE: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "sgd": functools.partial(_plain, torch.optim.SGD),
    "adam": functools.partial(_plain, torch.optim.Adam),
    "adamw": functools.partial(_plain, torch.optim.AdamW),
    "muon": _muon,
}
