"""Updates at learning rates that are on the device, where a CUDA graph can read what changes.

R_new is linear in the learning rate: what is worked out at rate 1 is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dbp_kernels import rules
from dbp_kernels.optim.step import Job, Update, local_updates


def updates_at(rates: Tensor, jobs: Sequence[Job]) -> list[tuple[Update, Tensor]]:
    """As ``local_updates``, but the jobs' own learning rates do not count: ``rates`` (jobs,) do."""
    units = [replace(job, options={**job.options, "lr": 1.0}) for job in jobs]
    return [
        (_scaled(update, job.grouped_R, rate.to(job.R.dtype)), loss)
        for (update, loss), job, rate in zip(local_updates(units), jobs, rates.unbind())
    ]


def _scaled(update: Update, R: Tensor, rate: Tensor) -> Update:
    """The update of R (groups, D, D) at a rate (0-dimensional), from that at 1, which is used up."""
    if isinstance(update, rules.ProductUpdate):
        return replace(update, MR=update.MR.mul_(rate))
    if isinstance(update, rules.LowRankUpdate):
        scale = (update.scale - 1).mul_(rate).add_(1)
        return replace(update, scale=scale, U=update.U.mul_(rate))
    update = update.view_as(R)
    return torch.lerp(R, update, rate, out=update)
