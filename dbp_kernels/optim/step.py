"""What one ``DecorUpdate.step()`` computes: every layer's update and loss, small equal ones together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import backends, choose, distributed, rules
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager.unfold import rows
from dbp_kernels.op_input import OpInput, op_inputs
from dbp_kernels.ops import check_update, patch_gram, patch_mean
from dbp_kernels.phases import PATCHES, PRODUCTS, span
from dbp_kernels.plain_call import plain
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.sampling import Layer

# Layers of equal shape share their products up to this D, by plan. Measured on a CPU: at D = 192 and
# above, plan "gram" loses more by stacking D x D matrices than it saves in calls.
_SMALL = {"gram": 128, "direct": 256, "samples": 256}
# GUESS, not measured: above this D one layer's tiles fill a GPU, and stacking only costs memory.
_SMALL_GPU = {"gram": 1152, "direct": 512, "samples": 512}


@dataclass
class Job:
    """One layer's update in one step."""

    layer: Layer
    samples: list[Tensor]
    options: dict[str, Any]
    index: int = 0  # of the layer, among all of its optimiser's
    rate: Tensor | None = None  # 0-dimensional, read by a CUDA graph in place of options["lr"]

    @cached_property
    def R(self) -> Tensor:
        return self.layer.R  # a module looks long for its buffers

    @cached_property
    def grouped_R(self) -> Tensor:
        """R as (groups, D, D)."""
        return self.R.view(-1, *self.R.shape[-2:])

    @property
    def demean(self) -> bool:
        demean: bool = self.options["demean"]
        return demean

    @property
    def clip(self) -> float | None:
        return self.options.get("clip")

    @property
    def rule(self) -> rules.UpdateRule:
        kind, kappa, dim = self.options["rule"], self.options["kappa"], self.R.shape[-1]
        return rules.UpdateRule.make(kind, kappa, dim, guarded=self.clip is not None)

    def check(self) -> None:
        """Raises as ``decor_update``: options and R may have been set by hand meanwhile."""
        R = self.R
        arguments = {key: self.options[key] for key in ("lr", "kappa", "rule")}
        check_update(R, **arguments, dim=R.shape[-1])
        clip = self.clip
        if clip is not None and not (isinstance(clip, (int, float)) and 0 < clip < 1):
            raise ValueError(f"clip={clip!r}: expected None, or a number above 0 and below 1")

    def geometries(self) -> tuple[list[ConvGeometry], torch.device, torch.dtype]:
        """Those of the samples, batch by batch, and where and as what these are."""
        inputs = self.inputs()
        return [input.geometry for input in inputs], inputs[0].x.device, inputs[0].x.dtype

    def inputs(self) -> list[OpInput]:
        """The samples in as few batches as their shapes allow, on R's device, as the ops see them."""
        device = self.R.device
        return self.layer._op_inputs([sample.to(device) for sample in self.samples])


@dataclass
class Batch:
    """Layers with one update for all of them, which R does not have yet.

    Attributes:
        jobs: of the same shape and options.
        R: (G, D, D), the layer's own, or copies of those of several, one after another.
        update: of R.
        sampled: 0-dimensional bool, whether the jobs had samples; None for yes.
    """

    jobs: Sequence[Job]
    R: Tensor
    update: rules.Update
    sampled: Tensor | None = None

    @property
    def stacked(self) -> bool:
        return len(self.jobs) > 1

    @property
    def clip(self) -> float | None:
        return self.jobs[0].clip

    @property
    def rate(self) -> float:
        """The step size, as far as the host knows it."""
        return self.jobs[0].options["lr"] if self.jobs[0].rate is None else 1.0

    @property
    def rates(self) -> Tensor | None:
        """What else is a factor of the step size, (jobs,)."""
        if self.jobs[0].rate is None:
            return None
        rates = [job.rate for job in self.jobs if job.rate is not None]
        return torch.stack(rates).to(self.R.dtype)

    @property
    def losses(self) -> Tensor:
        """(jobs,), the mean over each one's groups."""
        loss, jobs = self.update.loss, len(self.jobs)
        return loss if len(loss) == jobs else loss.view(jobs, -1).mean(1)

    def of_groups(self, values: Tensor) -> Tensor:
        """(G,), of values (jobs,)."""
        return values.view(-1, 1).expand(-1, len(self.R) // len(self.jobs)).reshape(-1)


def local_updates(jobs: Sequence[Job], gate: Tensor | None = None) -> list[Batch]:
    """The updates of all jobs from this process's samples, small equal layers together.

    Args:
        gate: becomes their ``sampled``.
    """
    batches: list[Batch] = []
    buckets: dict[Hashable, list[_Task]] = {}
    selected: dict[torch.device, str] = {}  # asked once: the answer takes longer than a launch
    for job in jobs:
        device = job.R.device
        if device not in selected:
            selected[device] = backends.selected(device)
        task = _task(job, selected[device])
        if task is None:
            batches.append(update_from(job, moments_of(job)))
        else:
            buckets.setdefault(_bucket(task), []).append(task)
    for tasks in buckets.values():
        if len(tasks) > 1:
            batches.append(_update_together(tasks))
            continue
        (task,) = tasks
        job, R, choice, input = task.job, task.R, task.choice, task.input
        if choice is None:
            # says what is wrong with R, if anything
            operands = input.x, job.R, *input.arguments
            torch.ops.dbp.decor_update(*operands, lr=0.0, kappa=job.options["kappa"])
            update = rules.no_update(R)
        else:
            work_out = backends.module(task.backend).decor_update
            update = work_out(input.x, R, input.geometry, job.rule, job.demean, choice)
        batches.append(Batch([job], R, update))
    for batch in batches:
        batch.sampled = gate
    return batches


@dataclass
class _Task:
    """A job whose samples are one input of an op.

    Attributes:
        R: (groups, D, D).
        input: the input.
        backend: the name of the one to run on.
        choice: the planner's; None: there is nothing to do, or R does not fit.
    """

    job: Job
    R: Tensor
    input: OpInput
    backend: str
    choice: Choice | None

    @property
    def patches(self) -> Tensor:
        """Z (groups, n, D) in R's dtype."""
        x, geometry = self.input.x, self.input.geometry
        return eager.patches(x, geometry, self.R.dtype, self.job.demean)


def _task(job: Job, backend: str) -> _Task | None:
    """All samples as one input of an op; None: moments are better.

    Few patches from inputs of several shapes become rows, so that the planner has its choice.
    """
    R, inputs = job.grouped_R, job.inputs()
    if len(inputs) > 1:
        if sum(input.geometry.samples for input in inputs) > R.shape[1]:
            return None
        with span(PATCHES):
            Z = torch.cat([rows(input.x, input.geometry, R.dtype) for input in inputs], 1)
        window = {"kernel_size": (), "groups": R.shape[0]}
        inputs = op_inputs([Z.transpose(0, 1).flatten(1)], window)
    (input,) = inputs
    if (input.x.dtype == torch.float64) != (R.dtype == torch.float64):
        input = replace(input, x=input.x.to(R.dtype))
    if backend != "eager" and not plain(input.x, R):  # kernels read memory, and nobody looks on
        backend = "eager"
    geometry, choice = input.geometry, None
    if R.shape[:2] == (geometry.groups, geometry.dim) and 0 not in (geometry.dim, geometry.samples):
        choice = choose.update(input.x, geometry, backend)
    return _Task(job, R, input, backend, choice)


def plan_of(job: Job) -> str:
    """The plan by which ``local_updates`` works out the job's update."""
    task = _task(job, backends.selected(job.R.device))
    if task is None:
        return "gram"  # from moments
    return "the operator's" if task.choice is None else task.choice.name


def _bucket(task: _Task) -> Hashable | None:
    """The plan, and all that layers must share to be updated together, unless large or without work."""
    R, geometry, choice = task.R, task.input.geometry, task.choice
    small = _SMALL if R.device.type == "cpu" else _SMALL_GPU
    if choice is None or geometry.dim > small[choice.name]:
        return id(task)  # by itself
    n = None if choice.name == "gram" else geometry.samples
    job = task.job
    options = [job.options["lr"], job.options["kappa"], job.options["rule"], job.clip]
    return choice.name, n, task.backend, R.shape, R.dtype, R.device, job.demean, *options


def _update_together(tasks: Sequence[_Task]) -> Batch:
    """Of layers of one `_bucket`, as groups of one batched update."""
    R = torch.cat([task.R for task in tasks])
    choices = [t.choice for t in tasks if t.choice is not None]  # all have one: see `_bucket`
    job, plan = tasks[0].job, choices[0].name
    backend = backends.module(tasks[0].backend)
    if plan == "gram":
        inputs = [(t.input.x, t.input.geometry) for t in tasks]
        S = torch.cat([backend.patch_gram(*x, c.algorithm) for x, c in zip(inputs, choices)])
        if job.demean:
            m = torch.cat([backend.patch_mean(*x) for x in inputs])
            S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
        with span(PRODUCTS):
            update = backend.gram_update(S, R, job.rule, overwrite=True)
    else:
        Z = torch.cat([task.patches for task in tasks])
        work_out = backend.direct_update if plan == "direct" else backend.low_rank_update
        with span(PRODUCTS):
            update = work_out(Z, R, job.rule)
    return Batch([task.job for task in tasks], R, update)


def moments_of(job: Job) -> distributed.Moments:
    """Sums over all patches of the job's samples."""
    R = job.grouped_R
    total = distributed.Moments(
        torch.zeros_like(R), R.new_zeros(R.shape[:2]) if job.demean else None, R.new_zeros(())
    )
    for input in job.inputs():
        n = input.geometry.samples
        total.second.add_(patch_gram(input.x, *input.arguments).to(R.dtype), alpha=n)
        if total.first is not None:
            total.first.add_(patch_mean(input.x, *input.arguments).to(R.dtype), alpha=n)
        total.count.add_(n)
    return total


def update_from(job: Job, moments: distributed.Moments) -> Batch:
    """The update of one job from the moments of all its samples."""
    R = job.grouped_R
    backend = backends.select(R.device)
    with span(PRODUCTS):
        update = backend.gram_update(moments.mean(), R, job.rule)
    return Batch([job], R, update)
