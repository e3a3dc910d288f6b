"""Carries out updates that have been worked out: each where it is finite, and none if one raises.

The step size is a number where the host knows it. A learning rate in memory, for CUDA graphs, and the
factor that keeps a step within its clip are known to the device only: (G, 1, 1), applied alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from dbp_kernels.interrupts import Once
from dbp_kernels.optim.guard import CLIPPED, SKIPPED, Gauge, Guard, hold_rows_
from dbp_kernels.optim.step import Batch
from dbp_kernels.phases import WRITE, span

State = Callable[[Tensor], dict[str, Tensor]]


class WriteBack:
    """Changes every R that has samples and a finite update, and its reports, when called.

    What takes memory to speak of comes before, when this is made. A call that raises can be made again:
    it goes on where it was.

    Args:
        batches: the layers.
        state_of: gives the state of an R, 0-dimensional "loss" (R's dtype), "skipped" and "clipped"
            (int64), which are written in place.
        guard: has been told that the step begins.

    Attributes:
        losses: of each device (layers,), in the order of the ``jobs`` there: what is reported.
        jobs: of each device.
    """

    def __init__(self, batches: Sequence[Batch], state_of: State, guard: Guard) -> None:
        by_device: dict[torch.device, list[Batch]] = {}
        for batch in batches:
            by_device.setdefault(batch.R.device, []).append(batch)
        self.jobs = {d: [job for b in own for job in b.jobs] for d, own in by_device.items()}
        self.losses: dict[torch.device, Tensor] = {}
        self._writes: list[Callable[[], object]] = []
        with span(WRITE):
            for device, own in by_device.items():
                self._prepare(own, state_of, guard.gauge(device))

    def __call__(self) -> None:
        with span(WRITE):
            while self._writes:
                self._writes[0]()
                del self._writes[0]

    def _prepare(self, batches: Sequence[Batch], state_of: State, gauge: Gauge) -> None:
        losses = torch.cat([batch.losses for batch in batches])
        finite = torch.stack([torch.cat(_bounds(batches)), losses]).isfinite().all(0)
        accept, skip = finite, ~finite
        states = [state_of(job.R) for batch in batches for job in batch.jobs]
        reported = [state["loss"] for state in states]
        sampled = [(b.sampled, len(b.jobs)) for b in batches if b.sampled is not None]
        if sampled:
            some = torch.cat([known.to(finite.device).expand(jobs) for known, jobs in sampled])
            accept, skip = finite & some, skip & some
            losses = torch.where(some, losses, torch.stack(reported))
        excess = [_excess(batch) for batch in batches]
        # of a layer, that of the worst of its groups
        worst = torch.cat([e.view(len(b.jobs), -1).amax(1) for b, e in zip(batches, excess)])
        clipped = (worst > 1) & accept
        counts = torch.stack([clipped, skip]).to(torch.int64)
        of_batches = counts[0].split([len(batch.jobs) for batch in batches])
        for batch, own, count, ok, over in zip(
            batches, excess, of_batches, *_decided(batches, accept, clipped)
        ):
            self._writes += _changes(batch, own, ok, over, count if gauge.held else None)
        self.losses[losses.device] = losses
        self._writes.append(partial(torch._foreach_copy_, reported, list(losses.unbind())))
        kinds = [state[kind] for kind in (CLIPPED, SKIPPED) for state in states]
        self._writes.append(Once(torch._foreach_add_, kinds, list(counts.flatten().unbind())))
        largest = max(batch.clip or 0.0 for batch in batches)
        self._writes.append(partial(gauge.note, worst, largest, counts))


def _bounds(batches: Sequence[Batch]) -> list[Tensor]:
    """Of every layer a number that is not finite if its change is not: (layers,) of each batch.

    All from one call, which GPUs make a few launches of however many layers there are. A norm
    squares: in float32 it also refuses changes beyond 1e19, where the next loss would overflow.
    """
    parts = [batch.update.parts(len(batch.jobs)) for batch in batches]
    norms = iter(torch._foreach_norm(list(chain.from_iterable(parts))))
    of_each = [
        b.update.bounds(list(islice(norms, len(p))), len(b.jobs)) for b, p in zip(batches, parts)
    ]
    return [bound * (b.rate if b.rates is None else b.rates) for b, bound in zip(batches, of_each)]


def _excess(batch: Batch) -> Tensor:
    """(G,), ||lr M'||_F over the clip: above 1, the step is too large. 0 without a clip."""
    square = batch.update.square
    if square is None or batch.clip is None:
        return batch.R.new_zeros(len(batch.R))
    excess = square.sqrt().mul_(batch.rate / batch.clip)
    return excess if batch.rates is None else excess.mul_(batch.of_groups(batch.rates))


def _on_host(x: Tensor) -> bool:
    """A CPU has nothing to wait for, and selections cost passes over R; no other device waits."""
    return x.is_cpu


def _decided(
    batches: Sequence[Batch], accept: Tensor, clipped: Tensor
) -> tuple[Sequence[Tensor | bool], Sequence[bool]]:
    """Of each batch, whether its layers' updates are accepted, and whether a step may be too large.

    The former (layers,), or a bool where the host knows that it is the same for all.
    """
    sizes = [len(batch.jobs) for batch in batches]
    oks = accept.split(sizes)
    if not _on_host(accept):
        return oks, [True] * len(batches)
    known = [ok.tolist() for ok in oks]
    same: list[Tensor | bool] = [
        own[0] if len(set(own)) == 1 else ok for own, ok in zip(known, oks)
    ]
    return same, [any(own) for own in map(Tensor.tolist, clipped.split(sizes))]


def _changes(
    batch: Batch, excess: Tensor, ok: Tensor | bool, over: bool, held: Tensor | None
) -> list[Callable[[], object]]:
    """What makes the updates of a batch that are ``ok``.

    Args:
        held: (layers,), becomes 1 where rows of R were held. None: none are to be.
    """
    jobs, R = batch.jobs, batch.R
    if ok is False:
        return []
    if ok is not True:
        ok = batch.of_groups(ok).view(-1, 1, 1)
        batch.update.cancel_unless_(ok)
    factor = None if batch.rates is None else batch.of_groups(batch.rates)
    if over:
        within = excess.nan_to_num(1.0, math.inf).clamp_(min=1).reciprocal_()  # of Inf, no step
        factor = within if factor is None else factor * within
    factor = None if factor is None else factor.view(-1, 1, 1)
    changes = batch.update.changes(R, batch.rate, factor, partial if batch.stacked else Once)
    if held is not None and batch.clip is not None:
        changes.append(partial(hold_rows_, R, ok, held))
    if not batch.stacked:
        return changes
    for change in changes:  # R is a copy
        change()
    return [
        partial(torch._foreach_copy_, [job.grouped_R for job in jobs], list(R.chunk(len(jobs))))
    ]
