"""What one training run consists of: nested dataclasses, from a YAML file and back, strictly checked.

A key that is not known, or a value of another type, is an error that names the key. Values may be
changed by dotted keys: ``config.override({"optimizer.lr": 1e-3, "model.options.widths": [32, 32]})``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

Options = dict[str, Any]
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class ModelConfig:
    """``name``: one of the experiments' models, or "package.module:function"; ``options`` go to it."""

    name: str = "convnet"
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """The data set.

    Attributes:
        name: "digits", "mnist", ...: what the task knows.
        dir: folder of its files.
        train_size, test_size: only the first so many examples; ``None``: all.
        validation_fraction: share of the training examples kept for choosing settings.
        augment: names of augmentations, applied in this order.
        options: what else its loader takes.
    """

    name: str = "digits"
    dir: str = "data"
    train_size: int | None = None
    test_size: int | None = None
    validation_fraction: float = 0.1
    augment: list[str] = field(default_factory=list)
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size"):
            value = getattr(self, name)
            _demand(value is None or value >= 1, f"data.{name}", value, "None or at least 1")
        fraction = self.validation_fraction
        _demand(0 < fraction < 1, "data.validation_fraction", fraction, "between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """``name``: "sgd", "adam", "adamw", "muon" or "foof"; ``options``: see ``optimizers.py``."""

    name: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        _demand(0 < self.lr < math.inf, "optimizer.lr", self.lr, "a positive number")
        _demand(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        _demand(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "from 0 to below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiple of ``optimizer.lr``; see ``schedules.py``.

    Attributes:
        name: "constant", "cosine", "linear" or "onecycle".
        warmup: share of all steps over which it rises.
        final: the multiple that is reached at the last step; not used by "constant".
    """

    name: str = "constant"
    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _demand(0 <= self.warmup < 1, "schedule.warmup", self.warmup, "a share from 0 to below 1")
        _demand(0 <= self.final <= 1, "schedule.final", self.final, "from 0 to 1")


MODES = ("learned", "identity", "orthogonal", "features")


@dataclass(frozen=True)
class DecorConfig:
    """Options of ``dbp.attach``, under its names and with its defaults; they are described there.

    Attributes:
        mode: "learned"; or one of the controls, whose R stands still: "identity" (R = I) and
            "orthogonal" (R random orthogonal). They pay for A = W R and dL/dW = dL/dA R^T; nothing
            is learnt, so that ``lr`` and what belongs to it is not used. "features": for models of
            ``feature_maps.py``, by ``dbp.DecorUpdate``.
    """

    lr: float = 1e-3
    kappa: float = 0.5
    sample: float | int = 0.1
    rule: str = "standard"
    update_every: int = 1
    demean: bool = False
    sampling: str = "first"
    budget: float | None = None
    costs: str = "measured"
    matmul_precision: str | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    groups: list[Options] | None = None
    max_size: int | None = None
    stagger: bool = True
    clip: float | None = 0.5
    cuda_graph: bool | None = None
    follow_lr: bool = True
    mode: str = "learned"

    def __post_init__(self) -> None:
        _demand(self.mode in MODES, "decor.mode", self.mode, f"one of {MODES}")

    def attach_options(self) -> Options:
        """The arguments of ``dbp.attach``."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del options["mode"]
        return {**options, "lr": 0.0} if self.mode in ("identity", "orthogonal") else options


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of one training run, apart from the machine.

    Attributes:
        task: "classification", or "package.module:Class" of a ``tasks.Task``.
        seed: fixes initial weights, order of the batches and augmentation, for all optimisers alike.
        epochs: passes over the training examples.
        batch_size: examples of a step, those of all processes together.
        device: "cpu", "cuda" or "cuda:1".
        threads: CPU threads; ``None``: torch's default.
        amp: ``None`` or "bf16" (autocast).
        channels_last: memory format of images and weights.
        compile: whether the training step's model goes through ``torch.compile``.
        checkpoint_every: epochs from one checkpoint to the next; 0: none are written.
        save_model: whether ``model.pt`` (the state dict) is left in the end.
        options: what else the task takes.
        decor: ``None``: plain backpropagation.
    """

    task: str = "classification"
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    device: str = "cpu"
    threads: int | None = None
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    checkpoint_every: int = 1
    save_model: bool = False
    options: Options = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    decor: DecorConfig | None = None

    def __post_init__(self) -> None:
        _demand(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _demand(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _demand(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        _demand(self.amp in (None, "bf16"), "amp", self.amp, "None or 'bf16'")
        _demand(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "at least 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """What is not given has its default. Raises ValueError naming the key that is wrong."""
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Raises FileNotFoundError, and ValueError naming the file for what is wrong in it."""
        try:
            values = parse_yaml(Path(path).read_text())
            return cls.from_dict({} if values is None else values)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> Options:
        """Nested dictionaries, of which ``from_dict`` makes the same configuration."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Every value, defaults too."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def override(self, changes: Mapping[str, Any]) -> RunConfig:
        """A copy with the values of dotted keys changed: ``{"decor.kappa": 0.2}``.

        A key below ``decor`` makes plain backpropagation decorrelated. Raises ValueError as
        ``from_dict``.
        """
        values = self.to_dict()
        for key, value in changes.items():
            *path, last = key.split(".")
            inner = values
            for number, name in enumerate(path, start=1):
                if inner.get(name) is None:
                    inner[name] = {}
                inner = inner[name]
                if not isinstance(inner, dict):
                    where = ".".join(path[:number])
                    raise ValueError(f"{key}: {where} is {inner!r}, which has nothing below it")
            inner[last] = value
        return RunConfig.from_dict(values)

    def differences(self, other: RunConfig) -> list[str]:
        """["optimizer.lr: 0.001, 0.002"]: the dotted keys whose values are not the same."""
        mine, others = flat(self.to_dict()), flat(other.to_dict())
        missing = object()
        return [
            f"{key}: {mine.get(key)!r}, {others.get(key)!r}"
            for key in {**mine, **others}
            if mine.get(key, missing) != others.get(key, missing)
        ]


def flat(values: Mapping[str, Any], prefix: str = "") -> Options:
    """{"optimizer.lr": 0.001} of {"optimizer": {"lr": 0.001}}; empty dictionaries are left out."""
    result: Options = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        result.update(flat(value, f"{key}.") if isinstance(value, dict) else {key: value})
    return result


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3, without a point, for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What a YAML text says, with 1e-3 a number. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def _demand(ok: bool, key: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {value!r}: expected {expected}")


def _build(cls: Callable[..., _Config], values: Any, prefix: str) -> _Config:
    """A dataclass of a mapping; ``prefix``: its own dotted key and a point, for messages."""
    if not isinstance(values, Mapping):
        where = prefix.removesuffix(".") or "the configuration"
        raise ValueError(f"{where} is {values!r}: expected a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    for name in values:
        _demand(name in hints, f"{prefix}{name}", values[name], f"one of the keys {list(hints)}")
    return cls(**{n: _convert(hints[n], v, f"{prefix}{n}") for n, v in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """The value as its field's type wants it: an int may stand for a float, and nothing else."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        if dataclasses.is_dataclass(choice):
            return _build(choice, value, f"{key}.")
        origin = typing.get_origin(choice) or choice
        if origin is list and isinstance(value, (list, tuple)):
            (item,) = typing.get_args(choice)
            return [_convert(item, entry, f"{key}[{i}]") for i, entry in enumerate(value)]
        if type(value) is origin:
            return copy.deepcopy(value)
    if float in choices and type(value) is int:
        return float(value)
    names = " or ".join(
        "None" if c is type(None) else getattr(c, "__name__", str(c)) for c in choices
    )
    raise ValueError(f"{key} is {value!r}: expected {names}")
