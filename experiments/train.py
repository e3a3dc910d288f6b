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
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dbp_kernels as dbp
from dbp_kernels.planning.geometry import make_geometry
from dbp_kernels.planning.planner import gram_choices
from experiments import checkpoint, parallel, schedules, tasks
from experiments.config import RunConfig
from experiments.energy import Meter
from experiments.environment import environment
from experiments.extras import need
from experiments.metrics import Row, to_csv
from experiments.optimizers import Optimizers

# As often the optimisers' work is gone through before a run begins: a CUDA graph is captured the second time.
WARM_UP_PERIODS = 3
# In what a run may differ that is continued: it decides nothing.
MAY_CHANGE = ("data.dir", "checkpoint_every", "save_model")


def _product(added: Any, a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _factorisation(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return math.prod(matrix) * matrix[-1] // 3


def _inverse(factor: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(factor) * factor[-1] // 3


def _second_moments(
    input: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **_: Any,
) -> int:
    geometry = make_geometry(input, kernel_size, stride, padding, dilation, groups)
    return round(1e9 * gram_choices(geometry)[0].gflop)


# What torch's counter leaves out, of the shapes it gives.
UNCOUNTED = {
    torch.ops.dbp.patch_gram: _second_moments,
    torch.ops.aten.addmm_: _product,
    torch.ops.aten.baddbmm_: _product,
    torch.ops.aten.linalg_cholesky_ex: _factorisation,
    torch.ops.aten.cholesky_inverse: _inverse,
}
# How often a long epoch looks whether its loss is still finite, for which a GPU has to be waited for.
CHECK_EVERY = 100


class Trainer:
    """A task's network with its optimisers, schedule and, if configured, DBP."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.task = tasks.build(config, device)
        self.optimizers = Optimizers(config, self.task.model)
        self.model: Any = self.task.model
        if parallel.world() > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        if config.compile:
            self.model = torch.compile(self.model)
        self.steps = config.epochs * self.task.steps_per_epoch
        self.done = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, batch: Any, model: nn.Module | None = None) -> Tensor:
        """One step of all optimisers; loss and score of the batch, (2,)."""
        self.optimizers.zero_grad()
        with self.autocast():
            loss, score = self.task.loss(model or self.model, batch)
        loss.backward()
        self.optimizers.step(schedules.factor(self.config.schedule, self.done, self.steps))
        self.done += 1
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
        decor = self.optimizers.decor
        losses = [] if decor is None else list(decor.losses().values())
        return torch.stack([v.float() for v in losses]).mean().item() if losses else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "task": self.task.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "done": self.done,
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
        self.optimizers.load_state_dict(state["optimizers"])
        self.done = state["done"]
        checkpoint.set_random_states(state["random"][parallel.rank()])

    def warm_up(self) -> int:
        """Steps that leave nothing behind, so that the run does not pay for first calls.

        Returns the floating point operations of a step of all processes, multiply-adds counted
        twice: those of products, convolutions and all of FOOF's work, on average over the optimisers'
        period.
        """
        state = copy.deepcopy(self.state_dict())
        self.task.model.train()
        flops = counted = 0
        for batch in self.task.batches(0):
            if counted < self.optimizers.period:
                counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
                # kernels of our own are not seen by the counter, nor is compiled code
                with counter, dbp.backend("eager"):
                    self.step(batch, self.task.model)
                flops += counter.get_total_flops()
                counted += 1
            elif self.done < counted * (1 + WARM_UP_PERIODS):
                self.step(batch)
            else:
                break
        self.load_state_dict(state)
        return flops * parallel.world() // counted


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
            return cast(dict[str, Any], finished)
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
        changed = [
            line
            for line in RunConfig.from_yaml(written).differences(config)
            if line.split(":")[0] not in MAY_CHANGE
        ]
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
        self.energy: float | None = 0.0
        self.meter = Meter(device)
        self.checkpoint = directory / "checkpoint.pt"
        if self.checkpoint.exists():
            state = checkpoint.load(self.checkpoint)
            self.trainer.load_state_dict(state["trainer"])
            self.rows = [Row(**row) for row in state["rows"]]
            self.energy = state["energy"]
            self._write_metrics()  # it was left as it was before the checkpoint, or is ahead of it

    def train(self, progress: bool) -> dict[str, Any]:
        """The epochs that are missing."""
        first = parallel.rank() == 0
        _forget_peak(self.device)
        tqdm = need("tqdm", "tqdm", "the progress bar").tqdm
        steps = self.config.epochs * self.trainer.task.steps_per_epoch
        done = self.rows[-1].step if self.rows else 0
        hidden = not (progress and first)
        with (
            _board(self.directory, done) if first else contextlib.nullcontext() as board,
            tqdm(total=steps, initial=done, unit="step", disable=hidden, file=sys.stderr) as bar,
        ):
            while not self._over():
                self._epoch(bar)
                self._write_metrics()
                if board is not None:
                    self._show(board)
                bar.set_postfix_str(f"test score {self.rows[-1].test_score:.4f}", refresh=False)
        return self._finish()

    def _write_metrics(self) -> None:
        if parallel.rank() == 0:
            text = to_csv(self.rows)
            checkpoint.write_atomically(self.directory / "metrics.csv", text.encode())

    def _show(self, board: Any) -> None:
        last = self.rows[-1]
        for name, value in dataclasses.asdict(last).items():
            if isinstance(value, float):
                board.add_scalar(name, value, last.step)

    def _over(self) -> bool:
        return len(self.rows) == self.config.epochs or self._diverged()

    def _diverged(self) -> bool:
        return bool(self.rows) and not math.isfinite(self.rows[-1].train_loss)

    def _epoch(self, bar: Any) -> None:
        trainer, before = self.trainer, self.rows[-1] if self.rows else None
        trainer.model.train()
        sums = torch.zeros(2, device=self.device)
        self._synchronize()
        joules, start = self.meter.joules(), time.perf_counter()
        count = 0
        for count, batch in enumerate(trainer.task.batches(len(self.rows)), start=1):
            sums += trainer.step(batch)
            bar.update()
            if count % CHECK_EVERY == 0 and not parallel.mean(sums)[0].isfinite():
                break
        self._synchronize()
        seconds = time.perf_counter() - start
        self._count_energy(joules)
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
                lr=trainer.optimizers.groups()[0]["lr"],
                decorrelation_loss=trainer.decorrelation_loss(),
            )
        )
        every = self.config.checkpoint_every
        if every and (self._over() or len(self.rows) % every == 0):
            self._save()

    def _count_energy(self, before: float | None) -> None:
        """What all processes' devices have taken since; ``None`` once one of them does not know."""
        after = self.meter.joules()
        own = None if before is None or after is None else after - before
        taken = parallel.of_all(own)
        if self.energy is None or None in taken:
            self.energy = None
        else:
            self.energy += sum(taken)

    def _save(self) -> None:
        state = {
            "trainer": self.trainer.state_dict(),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "energy": self.energy,
        }
        if parallel.rank() == 0:
            checkpoint.save(self.checkpoint, state)

    def _finish(self) -> dict[str, Any]:
        result = {
            "status": "diverged" if self._diverged() else "finished",
            "epochs": len(self.rows),
            "seconds": self.rows[-1].seconds,
            "flops_per_step": self.flops,
            "energy_joules": self.energy,
            "peak_memory_bytes": _peak_memory(self.device),
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


def _forget_peak(device: torch.device) -> None:
    """So that neither the warm-up, nor on Linux reading the data or an earlier run, counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Of the GPU's allocations; on a CPU of the whole process, data and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(
        OSError
    ):  # ru_maxrss counts what the process had that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _board(directory: Path, done: int) -> contextlib.AbstractContextManager[Any]:
    """TensorBoard's writer, if that is installed; what was told of steps after ``done`` is void."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return contextlib.nullcontext()
    return SummaryWriter(str(directory), purge_step=done + 1)
