"""Carries out updates that have been worked out: each where it is finite, and none if one raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.optim.step import Job, Update
from dbp_kernels.phases import WRITE, span


def write_back(
    jobs: Sequence[Job],
    updates: Sequence[tuple[Update, Tensor, Tensor | None]],
    state_of: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    """Change every R that has samples and a finite update, and its reports.

    Args:
        jobs: the layers.
        updates: for each its update, in the shapes of R as (groups, D, D) and in R's dtype; its
            loss, 0-dimensional of that dtype; whether there were samples, 0-dimensional bool, or
            None for yes.
        state_of: gives the state of an R, 0-dimensional "loss" (R's dtype) and "skipped" (int64),
            which are written in place.
    """
    by_device: dict[torch.device, list[tuple[Any, ...]]] = {}
    for job, update in zip(jobs, updates):
        by_device.setdefault(job.R.device, []).append((job, *update))
    with span(WRITE):
        for results in by_device.values():
            _to_device(state_of, *zip(*results))


def _to_device(
    state_of: Callable[[Tensor], dict[str, Tensor]],
    jobs: tuple[Job, ...],
    changes: tuple[Update, ...],
    losses: Sequence[Tensor],
    sampled: tuple[Tensor | None, ...],
) -> None:
    """Everything that takes memory comes first, so that nothing fails after the first change."""
    both = torch.stack([*_bounds(changes), *losses]).view(2, -1)
    finite = both.isfinite().all(0)
    accept, skip = finite, ~finite
    states = [state_of(job.R) for job in jobs]
    reported = [state["loss"] for state in states]
    if sampled[0] is not None:
        some = torch.stack([known.to(finite.device) for known in sampled if known is not None])
        accept, skip = finite & some, skip & some
        losses = torch.where(some, both[1], torch.stack(reported)).unbind()
    skips = skip.to(torch.int64).unbind()
    for job, change, ok in zip(jobs, changes, _decided(accept)):
        _change(job, change, ok)
    torch._foreach_copy_(reported, list(losses))
    torch._foreach_add_([state["skipped"] for state in states], list(skips))


def _bounds(changes: Sequence[Update]) -> list[Tensor]:
    """Of every change a number, 0-dimensional, that is not finite if the change is not.

    All from one call, which GPUs make a few launches of however many layers there are. A norm
    squares: in float32 it also refuses changes beyond 1e19, where the next loss would overflow.
    """
    parts = [(c,) if isinstance(c, Tensor) else c.parts for c in changes]
    norms = iter(torch._foreach_norm(list(chain.from_iterable(parts))))
    of_each = [list(islice(norms, len(p))) for p in parts]
    return [n[0] if isinstance(c, Tensor) else c.bound(*n) for c, n in zip(changes, of_each)]


def _decided(accept: Tensor) -> Sequence[bool | Tensor]:
    """A CPU has nothing to wait for, and selections cost passes over R; no other device waits."""
    return accept.tolist() if accept.is_cpu else accept.unbind()


def _change(job: Job, update: Update, ok: Tensor | bool) -> None:
    """Make the update of the job's R if ``ok``."""
    if ok is False:
        return
    if not isinstance(update, Tensor):
        if ok is not True:
            update.cancel_unless_(ok)
        update.apply_(job.grouped_R)
        return
    R = job.R
    new = update.view_as(R)
    if ok is True:
        R.copy_(new)
    else:
        torch.where(ok, new, R, out=R)
