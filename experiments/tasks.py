"""What is trained: a task builds a network and data, and says what loss and score are."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import parallel
from experiments.config import RunConfig
from experiments.data import load
from experiments.models import build_model


class Task(Protocol):
    """Built as ``Task(config, device)`` once the seed is set; a class of another module is used by
    ``task: package.module:Class``.

    Attributes:
        model: on the device, in its memory format.
        steps_per_epoch: optimiser steps that ``batches`` gives an epoch.
    """

    model: nn.Module
    steps_per_epoch: int

    def __init__(self, config: RunConfig, device: torch.device) -> None: ...

    def batches(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch (from 0), on the device, of ``config.batch_size`` examples.

        They depend on the seed, the epoch, ``state_dict()`` and torch's generators, nothing else.
        Of several processes (``parallel``) each gets its part.
        """

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(what backward() starts from, the score), both 0-dimensional means over the batch.

        ``model`` is ``self.model`` as it is to be called: compiled or within DDP, in training mode.
        """

    def evaluate(self, split: str) -> tuple[float, float]:
        """(loss, score) of ``self.model``, in eval mode without gradients; a higher score is better.

        split: "validation" or "test". Must leave all generators and ``state_dict()`` as they are.
        """

    def state_dict(self) -> dict[str, Any]:
        """What else an exact continuation needs, as ``checkpoint.save`` takes it."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


EVALUATED = 512  # images at a time: they need no gradients
SHOWN = 2000  # images to a model that looks at some before it is trained
OPTIONS = {"label_smoothing": 0.0, "mirrored": False, "evaluated": EVALUATED}


class Classification:
    """Images and their classes by cross-entropy; the score is accuracy.

    ``config.options``: ``label_smoothing`` (0); ``mirrored`` (False): evaluate by the mean of the logits
    of an image and of its mirror image; ``evaluated`` (512): so many images at a time.

    A model's method ``initialise_from``, if it has one, is given some training images, normalised and
    not augmented.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        unknown = set(config.options) - set(OPTIONS)
        if unknown:
            raise ValueError(f"options has {sorted(unknown)}: expected some of {list(OPTIONS)}")
        options = {**OPTIONS, **config.options}
        self.smoothing = float(options["label_smoothing"])
        self.mirrored, self.evaluated = bool(options["mirrored"]), int(options["evaluated"])
        if self.evaluated < 1:
            raise ValueError(f"options.evaluated is {self.evaluated}: expected at least 1")
        self.seed = config.seed
        self.batch_size = config.batch_size
        data = config.data
        self.data = load(
            data.name,
            data.dir,
            train_size=data.train_size,
            test_size=data.test_size,
            validation_fraction=data.validation_fraction,
            augment=data.augment,
            **data.options,
        ).to(device, config.channels_last)
        model = build_model(
            config.model.name, self.data.image_shape, self.data.num_classes, **config.model.options
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.device = device
        self.model = model.to(device=device, memory_format=layout)
        if hasattr(model, "initialise_from"):
            model.initialise_from(next(self.data.train.batches(SHOWN))[0])
        images, processes = len(self.data.train), parallel.world()
        self.steps_per_epoch = images // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size is {config.batch_size}: expected at most {images}, the number of "
                "training images"
            )
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size is {config.batch_size}: expected a multiple of {processes}, the number "
                "of processes"
            )

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of equal size: which images are left over is another matter of chance each time."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        part = parallel.rank(), parallel.world()
        return self.data.train.batches(self.batch_size, generator, part=part, drop_last=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        return loss, (logits.detach().argmax(1) == y).float().mean()

    def evaluate(self, split: str) -> tuple[float, float]:
        part = getattr(self.data, split)
        loss = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device, dtype=torch.int64)
        for x, y in part.batches(self.evaluated):
            logits = self.model(x)
            if self.mirrored:
                logits = (logits.float() + self.model(x.flip(3)).float()) / 2
            loss += F.cross_entropy(logits.float(), y, reduction="sum")
            hits += (logits.argmax(1) == y).sum()
        return loss.item() / len(part), hits.item() / len(part)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


TASKS: dict[str, type[Task]] = {"classification": Classification}


def build(config: RunConfig, device: torch.device) -> Task:
    """Raises ValueError for an unknown task."""
    if config.task in TASKS:
        return TASKS[config.task](config, device)
    module, colon, name = config.task.partition(":")
    if not colon:
        raise ValueError(
            f"task is {config.task!r}: expected one of {list(TASKS)}, or 'package.module:Class'"
        )
    try:
        task = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task is {config.task!r}: {error}") from error
    built: Task = task(config, device)
    return built
