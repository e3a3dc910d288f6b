"""Trains one network once, and measures it after every epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.configs import Config, Setting
from experiments.data import Dataset, Split
from experiments.models import build_model


@dataclass(frozen=True)
class Row:
    """One epoch of one run: a line of ``metrics.csv``.

    Training loss and accuracy are means over the epoch's batches as they were trained on;
    ``seconds`` is the run's training time so far, evaluation excluded; accuracies lie in [0, 1].
    """

    method: str
    lr: float
    decor_lr: float | None
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float
    epoch_seconds: float
    seconds: float
    decorrelation_loss: float | None


class Trainer:
    """A network, its optimiser and, for DBP, its ``DecorUpdate``.

    The seed fixes the initial weights and the order of the batches, and ``decorrelate_model`` keeps
    the weights: both methods start from the same network and see the same batches.
    """

    def __init__(self, config: Config, setting: Setting, seed: int, data: Dataset) -> None:
        self.config = config
        self.data = data
        self.device = data.train.x.device
        torch.manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.model: nn.Module = build_model(
            config.model,
            data.image_shape,
            data.num_classes,
            batch_norm=config.batch_norm,
            widths=config.widths,
            pool_every=config.pool_every,
        )
        self.decor = None
        if setting.method == "dbp":
            import dbp_kernels as dbp

            dbp.decorrelate_model(self.model)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        if setting.method == "dbp":
            self.decor = dbp.DecorUpdate(
                self.model,
                lr=setting.decor_lr,
                kappa=config.kappa,
                sample=config.sample,
                rule=config.rule,
                update_every=config.update_every,
                demean=config.demean,
            )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=setting.lr)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One optimiser step (and update of R). Returns the batch's loss and number of hits."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        if self.decor is not None:
            self.decor.step()
        return loss.detach(), (logits.detach().argmax(1) == y).sum()

    def epoch(self) -> tuple[float, float, float]:
        """One pass over the training split. Returns mean loss, accuracy and seconds."""
        train, size = self.data.train, self.config.batch_size
        self.model.train()
        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device, dtype=torch.int64)
        order = torch.randperm(len(train), generator=self.order).to(self.device)
        self._synchronize()
        start = time.perf_counter()
        for index in order.split(size):
            loss, hit = self.step(train.x[index], train.y[index])
            loss_sum += loss * len(index)
            hits += hit
        self._synchronize()
        seconds = time.perf_counter() - start
        return loss_sum.item() / len(train), hits.item() / len(train), seconds

    def evaluate(self, split: Split, batch_size: int = 1024) -> tuple[float, float]:
        """Mean loss and accuracy of the network in eval mode."""
        self.model.eval()
        loss = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device, dtype=torch.int64)
        with torch.no_grad(), self._autocast():
            for x, y in zip(split.x.split(batch_size), split.y.split(batch_size), strict=True):
                logits = self.model(x)
                loss += F.cross_entropy(logits.float(), y, reduction="sum")
                hits += (logits.argmax(1) == y).sum()
        return loss.item() / len(split), hits.item() / len(split)

    def decorrelation_loss(self) -> float | None:
        """Mean over layers of the decorrelation loss at the last update; ``None`` for BP."""
        if self.decor is None:
            return None
        return torch.stack([loss.float() for loss in self.decor.losses().values()]).mean().item()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def warm_up(config: Config, setting: Setting, data: Dataset, steps: int = 3) -> None:
    """Steps of a throwaway network, so that no run pays for first calls of the libraries."""
    trainer = Trainer(config, setting, 0, data)
    trainer.model.train()
    for start in range(steps):
        index = torch.arange(config.batch_size) + start
        index = index.remainder(len(data.train)).to(trainer.device)
        trainer.step(data.train.x[index], data.train.y[index])
    trainer.evaluate(data.test)


def train_run(
    config: Config, setting: Setting, seed: int, data: Dataset, on_row: Callable[[Row], None]
) -> None:
    """Trains one run and hands ``on_row`` a ``Row`` after every epoch.

    ``data`` must already lie on the device. A run whose loss is no longer finite goes on: its rows
    say so themselves.
    """
    trainer = Trainer(config, setting, seed, data)
    total = 0.0
    for epoch in range(1, config.epochs + 1):
        train_loss, train_accuracy, seconds = trainer.epoch()
        total += seconds
        validation_loss, validation_accuracy = trainer.evaluate(data.validation)
        test_loss, test_accuracy = trainer.evaluate(data.test)
        on_row(
            Row(
                method=setting.method,
                lr=setting.lr,
                decor_lr=setting.decor_lr,
                seed=seed,
                epoch=epoch,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                epoch_seconds=seconds,
                seconds=total,
                decorrelation_loss=trainer.decorrelation_loss(),
            )
        )
