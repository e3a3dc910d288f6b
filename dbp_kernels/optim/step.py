"""What one ``DecorUpdate.step()`` computes: every layer's update and loss, small equal ones together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
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

    @property
    def R(self) -> Tensor:
        return self.layer.R

    @property
    def grouped_R(self) -> Tensor:
        """R as (groups, D, D)."""
        R = self.R  # a module looks long for its buffers
        return R.view(-1, *R.shape[-2:])

    @property
    def demean(self) -> bool:
        demean: bool = self.options["demean"]
        return demean

    @property
    def rule(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("lr", "kappa", "rule")}

    def check(self) -> None:
        """Raises as ``decor_update``: options and R may have been set by hand meanwhile."""
        R = self.R
        check_update(R, **self.rule, dim=R.shape[-1])

    def geometries(self) -> tuple[list[ConvGeometry], torch.device, torch.dtype]:
        """Those of the samples, batch by batch, and where and as what these are."""
        inputs = self.inputs()
        return [input.geometry for input in inputs], inputs[0].x.device, inputs[0].x.dtype

    def inputs(self) -> list[OpInput]:
        """The samples in as few batches as their shapes allow, on R's device, as the ops see them."""
        device = self.R.device
        return self.layer._op_inputs([sample.to(device) for sample in self.samples])


# R_new, or what is to be done to R: either way, R itself has not changed yet.
Update = Tensor | rules.Update


def local_updates(jobs: list[Job]) -> list[tuple[Update, Tensor]]:
    """(update, loss) of every job from this process's samples, small equal layers together."""
    results: dict[int, tuple[Update, Tensor]] = {}
    buckets: dict[Any, list[tuple[int, _Task]]] = {}
    selected: dict[torch.device, str] = {}  # asked once: the answer takes longer than a launch
    for index, job in enumerate(jobs):
        device = job.R.device
        if device not in selected:
            selected[device] = backends.selected(device)
        task = _task(job, selected[device])
        if task is None:
            results[index] = update_from(job, moments_of(job))
            continue
        key = _bucket(task)
        if key is None:
            results[index] = _update_alone(task)
        else:
            buckets.setdefault(key, []).append((index, task))
    for members in buckets.values():
        indices, tasks = zip(*members)
        updates = [_update_alone(*tasks)] if len(tasks) == 1 else _update_together(tasks)
        results.update(zip(indices, updates))
    return [results[index] for index in range(len(jobs))]


@dataclass
class _Task:
    """A job whose samples are one input of an op.

    Attributes:
        R: (groups, D, D).
        input: the input.
        backend: the name of the one to run on.
        choice: the planner's; None: what is unusual is the op's to check and to compute.
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
    return _Task(job, R, input, backend, _choice(input.x, R, input.geometry, backend))


def plan_of(job: Job) -> str:
    """The plan by which ``local_updates`` works out the job's update."""
    task = _task(job, backends.selected(job.R.device))
    if task is None:
        return "gram"  # from moments
    return "the operator's" if task.choice is None else task.choice.name


def _choice(x: Tensor, R: Tensor, geometry: ConvGeometry, backend: str) -> Choice | None:
    """The planner's; None as in `_Task`."""
    if (
        geometry.dim == 0
        or R.shape[:2] != (geometry.groups, geometry.dim)
        or geometry.samples == 0
        or (x.dtype == torch.float64) != (R.dtype == torch.float64)
        or (backend != "eager" and not plain(x, R))  # kernels read memory, and nobody looks on
    ):
        return None
    return choose.update(x, geometry, backend)


def _bucket(task: _Task) -> Hashable | None:
    """The plan, and all that layers must share to be updated together; None: each by itself."""
    R, geometry, choice = task.R, task.input.geometry, task.choice
    small = _SMALL if R.device.type == "cpu" else _SMALL_GPU
    if choice is None or geometry.dim > small[choice.name]:
        return None
    n = None if choice.name == "gram" else geometry.samples
    job = task.job
    return choice.name, n, R.shape, R.dtype, R.device, job.demean, *job.rule.values()


def _update_alone(task: _Task) -> tuple[Update, Tensor]:
    job, choice, input = task.job, task.choice, task.input
    if choice is None:
        operands = input.x, job.R, *input.arguments
        R_new, loss = torch.ops.dbp.decor_update(*operands, **job.rule, demean=job.demean)
        return R_new, loss
    options = {**job.rule, "demean": job.demean, "choice": choice}
    work_out = backends.module(task.backend).decor_update
    update, loss = work_out(input.x, task.R, input.geometry, **options)
    return update, _means(loss, 1)[0]


def _update_together(tasks: Sequence[_Task]) -> Iterator[tuple[Tensor, Tensor]]:
    """(R_new, loss) of layers of one `_bucket`, as groups of one batched update."""
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
            R_new, loss = backend.update_from_gram(S, R, **job.rule, overwrite=True)
    else:
        Z = torch.cat([task.patches for task in tasks])
        with span(PRODUCTS):
            if plan == "direct":
                R_new, loss = backend.update_direct(Z, R, **job.rule)
            else:
                update, loss = backend.low_rank_update(Z, R, **job.rule)
                R_new = update.new(R)
    return zip(R_new.chunk(len(tasks)), _means(loss, len(tasks)))


def _means(loss: Tensor, layers: int) -> Sequence[Tensor]:
    """Each layer's mean, 0-dimensional, over as many groups as the others have."""
    return (loss if len(loss) == layers else loss.view(layers, -1).mean(1)).unbind()


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


def update_from(job: Job, moments: distributed.Moments) -> tuple[Tensor, Tensor]:
    """(R_new, loss) of one job from the moments of all its samples."""
    backend = backends.select(job.R.device)
    with span(PRODUCTS):
        R_new, loss = backend.update_from_gram(moments.mean(), job.grouped_R, **job.rule)
    return R_new, loss.mean()
