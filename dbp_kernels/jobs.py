"""What one ``DecorUpdate.step()`` computes: every layer's update and loss, small equal ones together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbp_kernels import backends, distributed, functional, plans
from dbp_kernels.backends.eager import ops as eager
from dbp_kernels.backends.eager.unfold import rows
from dbp_kernels.choices import update_choices
from dbp_kernels.geometry import ConvGeometry
from dbp_kernels.ops import check_update, geometry_of

# Layers of equal shape share their products up to this D, by plan. Measured on a CPU: at D = 192 and
# above, plan "gram" loses more by stacking D x D matrices than it saves in calls.
_SMALL = {"gram": 128, "direct": 256, "samples": 256}
# GUESS, not measured: above this D one layer's tiles fill a GPU, and stacking only costs memory.
_SMALL_GPU = {"gram": 1152, "direct": 512, "samples": 512}


@dataclass
class Job:
    """One layer's update in one step."""

    layer: nn.Module
    samples: list[Tensor]
    options: dict[str, Any]
    index: int = 0  # of the layer, among all of its optimiser's

    @property
    def R(self) -> Tensor:
        return self.layer.R

    @property
    def grouped_R(self) -> Tensor:
        """R as (groups, D, D)."""
        return self.R.view(-1, *self.R.shape[-2:])

    @property
    def demean(self) -> bool:
        return self.options["demean"]

    @property
    def rule(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("lr", "kappa", "rule")}

    def check(self) -> None:
        """Raises as ``decor_update``: options and R may have been set by hand meanwhile."""
        check_update(self.R, **self.rule, dim=self.R.shape[-1])

    def geometries(self) -> tuple[list[ConvGeometry], torch.device, torch.dtype]:
        """Those of the samples, batch by batch, and where and as what these are."""
        prepared = list(_prepared(self))
        x = prepared[0][0]
        return [geometry_of(x, *rest) for x, rest in prepared], x.device, x.dtype

    def batches(self) -> list[Tensor]:
        """The samples in as few batches as their shapes allow, on R's device."""
        samples = [sample.to(self.R.device) for sample in self.samples]
        if not self.layer._patch_geometry()["kernel_size"]:
            samples = [sample.reshape(-1, sample.shape[-1]) for sample in samples]
        alike: dict[Any, list[Tensor]] = {}
        for sample in samples:
            alike.setdefault((sample.shape[1:], sample.dtype), []).append(sample)
        return [batch[0] if len(batch) == 1 else torch.cat(batch) for batch in alike.values()]


# R_new, or what is to be done to R: either way, R itself has not changed yet.
Update = Tensor | plans.Update


def local_updates(jobs: list[Job]) -> list[tuple[Update, Tensor]]:
    """(update, loss) of every job from this process's samples, small equal layers together."""
    results: dict[int, tuple[Update, Tensor]] = {}
    buckets: dict[Any, list[tuple[int, Tensor, ConvGeometry, tuple]]] = {}
    for index, job in enumerate(jobs):
        prepared = _one_input(job)
        if prepared is None:
            results[index] = update_from(job, moments_of(job))
            continue
        x, arguments = prepared
        geometry = geometry_of(x, *arguments)
        plan = _plan(job, x, geometry)
        key = _bucket(job, plan, geometry)
        if key is None:
            results[index] = _update_alone(job, plan, x, geometry, arguments)
        else:
            buckets.setdefault(key, []).append((index, x, geometry, arguments))
    for (plan, *_), members in buckets.items():
        indices, xs, geometries, arguments = zip(*members)
        if len(members) == 1:
            results[indices[0]] = _update_alone(jobs[indices[0]], plan, *members[0][1:])
        else:
            together = [jobs[i] for i in indices]
            results.update(
                zip(indices, _update_together(plan, together, xs, geometries, arguments))
            )
    return [results[index] for index in range(len(jobs))]


def _one_input(job: Job) -> tuple[Tensor, tuple] | None:
    """All samples as one input of an op, with its geometry's arguments; None: moments are better.

    Few patches from inputs of several shapes become rows, so that the planner has its choice.
    """
    prepared = list(_prepared(job))
    if len(prepared) == 1:
        return prepared[0]
    geometries = [geometry_of(x, *arguments) for x, arguments in prepared]
    groups, size, _ = job.grouped_R.shape
    if sum(geometry.samples for geometry in geometries) > size:
        return None
    Z = torch.cat([rows(x, g, job.R.dtype) for (x, _), g in zip(prepared, geometries)], 1)
    return Z.transpose(0, 1).flatten(1), ([], [], [], [], groups)


def _prepared(job: Job) -> Iterator[tuple[Tensor, tuple]]:
    """Every batch of the job's samples as an op's input, with its geometry's arguments."""
    for batch in job.batches():
        yield functional.op_arguments(batch, **{**_NO_WINDOW, **job.layer._patch_geometry()})[:2]


_NO_WINDOW = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


def _plan(job: Job, x: Tensor, geometry: ConvGeometry) -> str | None:
    """The planner's plan; None: what is unusual is the op's to check and to compute."""
    R = job.grouped_R
    if (
        geometry.dim == 0
        or R.shape[:2] != (geometry.groups, geometry.dim)
        or geometry.samples == 0
        or (x.dtype == torch.float64) != (R.dtype == torch.float64)
    ):
        return None
    return update_choices(geometry, R.device.type, x.dtype)[0].name


def _bucket(job: Job, plan: str | None, geometry: ConvGeometry) -> tuple | None:
    """The plan, and all that layers must share to be updated together; None: each by itself."""
    R = job.grouped_R
    small = _SMALL if R.device.type == "cpu" else _SMALL_GPU
    if plan is None or geometry.dim > small[plan]:
        return None
    n = None if plan == "gram" else geometry.samples
    return plan, n, R.shape, R.dtype, R.device, job.demean, *job.rule.values()


def _update_alone(
    job: Job, plan: str | None, x: Tensor, geometry: ConvGeometry, arguments: tuple
) -> tuple[Update, Tensor]:
    R = job.grouped_R
    if plan == "samples":
        Z = eager.patches(x, geometry, R.dtype, job.demean)
        update, loss = backends.select(R.device).low_rank_update(Z, R, **job.rule)
    elif plan is not None and backends.selected(R.device) == "eager":
        update, loss = eager.work_out(x, R, geometry, **job.rule, demean=job.demean)
    else:
        return torch.ops.dbp.decor_update(x, job.R, *arguments, **job.rule, demean=job.demean)
    return update, loss.mean()


def _update_together(
    plan: str,
    jobs: list[Job],
    xs: Sequence[Tensor],
    geometries: Sequence[ConvGeometry],
    arguments: Sequence[tuple],
) -> Iterator[tuple[Tensor, Tensor]]:
    """(R_new, loss) of layers of one `_bucket`, as groups of one batched update."""
    R = torch.cat([job.grouped_R for job in jobs])
    backend = backends.select(R.device)
    if plan == "gram":
        S = torch.cat([torch.ops.dbp.patch_gram(x, *a) for x, a in zip(xs, arguments)])
        if jobs[0].demean:
            m = torch.cat([torch.ops.dbp.patch_mean(x, *a) for x, a in zip(xs, arguments)])
            S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
        R_new, loss = backend.update_from_gram(S, R, **jobs[0].rule, overwrite=True)
    else:
        demean = jobs[0].demean
        Z = torch.cat([eager.patches(x, g, R.dtype, demean) for x, g in zip(xs, geometries)])
        if plan == "direct":
            R_new, loss = backend.update_direct(Z, R, **jobs[0].rule)
        else:
            update, loss = backend.low_rank_update(Z, R, **jobs[0].rule)
            R_new = update.new(R)
    return zip(R_new.chunk(len(jobs)), loss.view(len(jobs), -1).mean(1).unbind())


def moments_of(job: Job) -> distributed.Moments:
    """Sums over all patches of the job's samples."""
    R = job.grouped_R
    total = distributed.Moments(
        torch.zeros_like(R), R.new_zeros(R.shape[:2]) if job.demean else None, R.new_zeros(())
    )
    for x, arguments in _prepared(job):
        n = geometry_of(x, *arguments).samples
        total.second.add_(torch.ops.dbp.patch_gram(x, *arguments).to(R.dtype), alpha=n)
        if job.demean:
            total.first.add_(torch.ops.dbp.patch_mean(x, *arguments).to(R.dtype), alpha=n)
        total.count.add_(n)
    return total


def update_from(job: Job, moments: distributed.Moments) -> tuple[Tensor, Tensor]:
    """(R_new, loss) of one job from the moments of all its samples."""
    backend = backends.select(job.R.device)
    R_new, loss = backend.update_from_gram(moments.mean(), job.grouped_R, **job.rule)
    return R_new, loss.mean()
