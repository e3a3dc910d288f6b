"""Trains one network once: everything about the run goes into its directory, and it can go on.

=============  =====================================================================================
config.yaml    every value of the configuration
metrics.csv    one line an epoch (``metrics.Row``)
result.json    written when the run is over: how it ended, seconds, FLOPs, energy, machine
checkpoint.pt  while it is not over
model.pt       the state dict, with ``save_model``
events.*       the same metrics for TensorBoard, if that is installed
=============  =====================================================================================

A run that was ended by whatever, at whatever moment, continues from its last checkpoint with
``resume`` as if nothing had happened: all of it but the seconds is the same to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import checkpoint, decorrelation, optimizers, parallel, schedules, tasks
from experiments.config import RunConfig
from experiments.environment import environment
from experiments.extras import need
from experiments.metrics import Row, to_csv

WARM_UP_STEPS = 3
# How often a long epoch looks whether its loss is still finite, for which a GPU has to be waited for.
CHECK_EVERY = 100


class Trainer:
    """A task's network with its optimisers, schedule and, if configured, DBP."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.task = tasks.build(config, device)
        self.optimizers = optimizers.build(config.optimizer, self.task.model)
        self.decor = None
        if config.decor is not None:
            self.decor = decorrelation.attach(
                config.decor, self.task.model, self.optimizers, config.seed
            )
        self.model: Any = self.task.model
        if parallel.world() > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        if config.compile:
            self.model = torch.compile(self.model)
        self.steps = config.epochs * self.task.steps_per_epoch
        self.step_number = 0
        for group in self.groups():
            group["initial_lr"] = group["lr"]

    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' parameter groups, which ``load_state_dict`` makes anew."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, batch: Any) -> Tensor:
        """One step of all optimisers; loss and score of the batch, (2,)."""
        factor = schedules.factor(self.config.schedule, self.step_number, self.steps)
        for group in self.groups():
            group["lr"] = group["initial_lr"] * factor
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, score = self.task.loss(self.model, batch)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number += 1
        return torch.stack([loss.detach().float(), score.detach().float()])

    def evaluate(self, split: str) -> tuple[float, float]:
        """By the first process, whose buffers (batch norm) are those that count."""
        result = None
        if parallel.rank() == 0:
            self.task.model.eval()
            with torch.no_grad(), self.autocast():
                result = self.task.evaluate(split)
        told: tuple[float, float] = parallel.of_first(result)
        return told

    def decorrelation_loss(self) -> float | None:
        """Mean over layers at their last updates; ``None`` where R does not learn."""
        losses = [] if self.decor is None else list(self.decor.losses().values())
        return torch.stack([v.float() for v in losses]).mean().item() if losses else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "task": self.task.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step_number": self.step_number,
            "random": parallel.of_all(checkpoint.random_states()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["random"]) != parallel.world():
            raise ValueError(
                f"the checkpoint is of {len(state['random'])} processes: expected to continue with "
                f"as many, not {parallel.world()}"
            )
        self.task.model.load_state_dict(state["model"])
        self.task.load_state_dict(state["task"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.step_number = state["step_number"]
        checkpoint.set_random_states(state["random"][parallel.rank()])

    def warm_up(self) -> int:
        """Steps that leave nothing behind, so that the run does not pay for first calls.

        Returns the floating point operations of one of them, multiply-adds counted twice.
        """
        state = copy.deepcopy(self.state_dict())
        self.model.train()
        counter = FlopCounterMode(display=False)
        for number, batch in zip(range(WARM_UP_STEPS), self.task.batches(0), strict=False):
            with counter if number == 0 else contextlib.nullcontext():
                self.step(batch)
        self.load_state_dict(state)
        return counter.get_total_flops()


def run(
    config: RunConfig, directory: Path, resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains once and writes everything into ``directory``; returns what is in result.json.

    Under torchrun the processes share the batches (DDP), and the first one writes.

    Args:
        directory: made if it is not there.
        resume: continue from what is there already, if anything is; a run that is over is left
            alone, and its result returned.
        progress: whether to draw a progress bar, on stderr.

    Raises:
        FileExistsError: the directory has files, and not ``resume``.
        ValueError: the directory has a run of another configuration; a configuration that makes no
            sense, naming its key.
    """
    with parallel.processes(_device(config)) as device:
        finished = parallel.of_first(_prepare(config, directory, resume))
        if finished is not None:
            return finished
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads or threads)
        try:
            return _Run(config, directory, device).train(progress)
        finally:
            torch.set_num_threads(threads)


def _device(config: RunConfig) -> torch.device:
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device is {config.device!r}: expected 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device!r}, but torch sees no CUDA device")
    return device


def _prepare(config: RunConfig, directory: Path, resume: bool) -> dict[str, Any] | None:
    """Makes the directory; gives the result if the run is over."""
    if parallel.rank() != 0:
        return None
    written = directory / "config.yaml"
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is not a folder")
    if directory.is_dir() and any(directory.iterdir()) and not resume:
        raise FileExistsError(
            f"{directory} has files already: expected another one, or resume to continue its run"
        )
    if written.exists():
        changed = RunConfig.from_yaml(written).differences(config)
        if changed:
            raise ValueError(f"{directory} has another run (then, now): {'; '.join(changed)}")
        if (directory / "result.json").exists():
            result: dict[str, Any] = json.loads((directory / "result.json").read_text())
            return result
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(written, config.to_yaml().encode())
    return None


class _Run:
    """What has happened so far, as it is on the disk."""

    def __init__(self, config: RunConfig, directory: Path, device: torch.device) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.trainer = Trainer(config, device)
        self.flops = self.trainer.warm_up()
        self.rows: list[Row] = []
        self.checkpoint = directory / "checkpoint.pt"
        if self.checkpoint.exists():
            state = checkpoint.load(self.checkpoint)
            self.trainer.load_state_dict(state["trainer"])
            self.rows = [Row(**row) for row in state["rows"]]

    def train(self, progress: bool) -> dict[str, Any]:
        """The epochs that are missing."""
        first = parallel.rank() == 0
        tqdm = need("tqdm", "tqdm", "the progress bar").tqdm
        steps = self.config.epochs * self.trainer.task.steps_per_epoch
        done = self.rows[-1].step if self.rows else 0
        hidden = not (progress and first)
        with tqdm(total=steps, initial=done, unit="step", disable=hidden, file=sys.stderr) as bar:
            while not self._over():
                self._epoch(bar)
                if first:
                    text = to_csv(self.rows)
                    checkpoint.write_atomically(self.directory / "metrics.csv", text.encode())
                bar.set_postfix_str(f"test score {self.rows[-1].test_score:.4f}", refresh=False)
        return self._finish()

    def _over(self) -> bool:
        return len(self.rows) == self.config.epochs or self._diverged()

    def _diverged(self) -> bool:
        return bool(self.rows) and not math.isfinite(self.rows[-1].train_loss)

    def _epoch(self, bar: Any) -> None:
        trainer, before = self.trainer, self.rows[-1] if self.rows else None
        trainer.model.train()
        sums = torch.zeros(2, device=self.device)
        self._synchronize()
        start = time.perf_counter()
        count = 0
        for count, batch in enumerate(trainer.task.batches(len(self.rows)), start=1):
            sums += trainer.step(batch)
            bar.update()
            if count % CHECK_EVERY == 0 and not math.isfinite(sums[0].item()):
                break
        self._synchronize()
        seconds = time.perf_counter() - start
        loss, score = (parallel.mean(sums) / count).tolist()
        step = count + (before.step if before else 0)
        validation, test = trainer.evaluate("validation"), trainer.evaluate("test")
        self.rows.append(
            Row(
                epoch=len(self.rows) + 1,
                step=step,
                examples=step * self.config.batch_size,
                seconds=seconds + (before.seconds if before else 0.0),
                train_loss=loss,
                train_score=score,
                validation_loss=validation[0],
                validation_score=validation[1],
                test_loss=test[0],
                test_score=test[1],
                lr=trainer.groups()[0]["lr"],
                decorrelation_loss=trainer.decorrelation_loss(),
            )
        )
        every = self.config.checkpoint_every
        if every and (self._over() or len(self.rows) % every == 0):
            self._save()

    def _save(self) -> None:
        state = {
            "trainer": self.trainer.state_dict(),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        if parallel.rank() == 0:
            checkpoint.save(self.checkpoint, state)

    def _finish(self) -> dict[str, Any]:
        result = {
            "status": "diverged" if self._diverged() else "finished",
            "epochs": len(self.rows),
            "seconds": self.rows[-1].seconds,
            "flops_per_step": self.flops,
            **environment(),
        }
        if parallel.rank() == 0:
            if self.config.save_model:
                checkpoint.save(self.directory / "model.pt", self.trainer.task.model.state_dict())
            text = json.dumps(result, indent=2) + "\n"
            checkpoint.write_atomically(self.directory / "result.json", text.encode())
            self.checkpoint.unlink(missing_ok=True)
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
