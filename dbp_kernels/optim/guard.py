"""What keeps every R finite and invertible, and tells when it had to.

A step's own matrix is made small enough by a factor (``write_back``): I - lr M' then has eigenvalues
from 1 - clip to 1 + clip, and no step makes R singular. That alone does not bound R, which may grow
for as long as there are steps: rows of R are held at MAX_ROW. To look at them is a pass over R, for
which there is hardly ever a reason: no row grows by more than ||lr M'|| ||R||, and the steps since R
was last looked at say how much that is at most. Devices keep that account, and the host reads it
without waiting, so that it is some steps old on a GPU; those count as the largest that clip allows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import user_warnings
from dbp_kernels.interrupts import version
from dbp_kernels.optim.step import Job
from dbp_kernels.optim.swap import some

States = Callable[[], dict[str, dict[str, Tensor]]]  # of R, by the names of layers

# The norm of a row of R is 1 / sigma where it brings a direction of standard deviation sigma to
# variance 1. Beyond this norm sigma^2 is 2^-24, what float32 cannot tell from 0 beside a variance of
# 1: the row would amplify rounding errors.
MAX_ROW = 4096.0
_HELD = MAX_ROW * (1 - 2.0**-16)  # what longer rows are scaled to: rounding must not pass MAX_ROW

CLIPPED, SKIPPED = "clipped", "skipped"
_TELLING = {
    CLIPPED: (
        "a step of R of {} was clipped, or a row of R held: lr is too large for the layer's input, or "
        "some of that hardly varies; lower lr, or normalise the input (clipped() counts such steps)"
    ),
    SKIPPED: (
        "an update of R of {} was skipped, as samples or result are not finite; look for NaN and Inf, "
        "lower lr, or normalise the layer's input (skipped() counts such updates)"
    ),
}


def hold_rows_(R: Tensor, ok: Tensor | bool, held: Tensor) -> None:
    """Scale rows of R (G, D, D) that are longer than MAX_ROW back to it, the others by exactly 1.

    Only in groups that are ``ok``, (G, 1, 1) or True. Once more, it changes nothing.

    Args:
        held: (layers,) whose groups these are, becomes 1 where there are such rows.
    """
    rows = torch.linalg.vector_norm(R, dim=-1, keepdim=True)
    long = (rows > MAX_ROW) & rows.isfinite() & ok
    held |= long.view(len(held), -1).any(1)  # before R, which does not tell afterwards
    R.mul_((_HELD / rows).masked_fill_(~long, 1))


class Later:
    """A small tensor on its way to the host; nothing waits for it.

    From devices other than CPUs and CUDA it never comes.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values.clone() if values.is_cpu else None
        self._event = None
        if values.is_cuda:
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def get(self) -> list[Any] | None:
        """What it holds, or None while it is on its way."""
        if self._host is None or (self._event is not None and not self._event.query()):
            return None
        values: list[Any] = self._host.tolist()
        return values


class Gauge:
    """How far the rows of all guarded R on one device can have grown, and how often they were held.

    Attributes:
        held: whether the step to come holds rows.
        everything: within a step, gives all guarded R on this device.
    """

    def __init__(self, device: torch.device) -> None:
        # The longest row and the largest norm of an R when they were last looked at; the product of
        # 1 + ||lr M'|| since then, of the largest in each step; updates clipped, and skipped.
        self.values = torch.zeros(5, dtype=torch.float32, device=device)
        self.values[2].fill_(1)  # by the device: a capture allows no copies from the host
        self.held = True
        self.everything: Callable[[], list[Tensor]] = list
        # R and its version, by layer, after a step; weakly, as a model that moves leaves its R behind
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._clip = 0.0  # the largest there has been
        self._steps = 0
        self._reading: tuple[Later, int] | None = None
        self._known: list[float] | None = None
        self._read_at = 0
        self._counts: tuple[list[str], Later] | None = None
        self._counted = [0.0, 0.0]
        self._told: dict[str, set[str]] = {CLIPPED: set(), SKIPPED: set()}

    def begin(
        self, Rs: Mapping[int, Tensor], clip: float, everything: Callable[[], list[Tensor]]
    ) -> None:
        """Decide whether the step to come holds rows.

        Args:
            Rs: those of the step that are guarded, by layer.
            clip: the largest of theirs.
            everything: gives all guarded R on this device.
        """
        self.everything = everything
        if not Rs:
            self.held = False
            return
        if _capturing(self.values):  # by whoever calls step(): replays will not ask
            self.held = True
            return
        self._read()
        if any(not self._same(layer, R) for layer, R in Rs.items()):
            self._look()
            self._known = self._reading = None
            self._start_reading()
            self._read()
        self._clip = max(self._clip, clip)
        self.held = not self._reach(self._clip) <= MAX_ROW  # NaN: somebody has put it into an R

    def _same(self, layer: int, R: Tensor) -> bool:
        """Whether nobody else has written to R since our last step."""
        before, then = self._seen.get(layer, (lambda: None, 0))
        return before() is R and then == version(R)

    def _reach(self, clip: float) -> float:
        """The longest that a row can be after the step to come."""
        if self._known is None:
            return math.inf
        row, whole, growth = self._known[:3]
        unknown = min(self._steps - self._read_at + 1, 100)
        return row + whole * (growth * (1 + clip) ** unknown - 1)

    def _look(self) -> None:
        Rs = self.everything()
        rows = [torch.linalg.vector_norm(R, dim=-1).flatten() for R in Rs if R.numel()]
        if rows:
            whole = torch.stack(torch._foreach_norm(rows)).amax()
            longest = torch.stack(torch._foreach_max(rows)).amax()
            self.values[:3].copy_(torch.stack([longest, whole, torch.ones_like(whole)]))

    def addresses(self) -> Hashable:
        """Of what ``note`` reads beside its arguments, where rows are held."""
        return tuple(R.data_ptr() for R in self.everything())

    def note(self, excess: Tensor, clip: float, counts: Tensor) -> None:
        """Take note of a step, when R has changed. Of one noted twice R is taken to have grown twice.

        Args:
            excess: of each layer, ||lr M'|| over its clip.
            clip: the largest.
            counts: (2, layers), whether each was clipped, and skipped.
        """
        if self.held:
            self._look()
        else:
            growth, most = self.values[2], excess.nan_to_num(0.0, 1.0).clamp_(max=1).amax()
            growth.addcmul_(growth, most.to(growth.dtype), value=clip)
        self.values[3:].add_(counts.sum(1))

    def end(self, Rs: Mapping[int, Tensor], states: States) -> None:
        """After a step: begin to read the account, and warn of what is new in it.

        Args:
            Rs: as for ``begin``.
            states: gives the states of the layers on this device, by name.
        """
        self._steps += 1
        for layer, R in Rs.items():
            self._seen[layer] = weakref.ref(R), version(R)
        if _capturing(self.values):
            return
        if self._reading is None:
            self._start_reading()
        self._read()
        if self._known is not None and self._known[3:] != self._counted and self._counts is None:
            self._counted = self._known[3:]
            layers = states()
            counts = [state[kind] for state in layers.values() for kind in (CLIPPED, SKIPPED)]
            if counts:
                self._counts = list(layers), Later(torch.stack(counts).view(-1, 2))
        self._tell()

    def _start_reading(self) -> None:
        self._reading = Later(self.values), self._steps

    def _read(self) -> None:
        if self._reading is not None and (values := self._reading[0].get()) is not None:
            self._known, self._read_at = values, self._reading[1]
            self._reading = None

    def _tell(self) -> None:
        if self._counts is None or (counts := self._counts[1].get()) is None:
            return
        names, self._counts = self._counts[0], None
        for kind, column in ((CLIPPED, 0), (SKIPPED, 1)):
            told = self._told[kind]
            new = [name for name, row in zip(names, counts) if row[column] and name not in told]
            if new:
                told.update(new)
                layers = ("layer " if len(new) == 1 else "layers ") + some(new)
                user_warnings.warn(_TELLING[kind].format(layers), RuntimeWarning)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Guard:
    """The gauges of one optimiser's devices. ``jobs`` are those of a step."""

    def __init__(self) -> None:
        self._gauges: dict[torch.device, Gauge] = {}

    def gauge(self, device: torch.device) -> Gauge:
        if device not in self._gauges:
            self._gauges[device] = Gauge(device)
        return self._gauges[device]

    def begin(self, jobs: Sequence[Job], guarded: Callable[[], list[Tensor]]) -> None:
        """Before a step works anything out. ``guarded`` gives every R that has a clip."""
        for device, own in _by_device(jobs).items():
            clip = max((job.clip for job in own if job.clip), default=0.0)

            def there(device: torch.device = device) -> list[Tensor]:
                return [R for R in guarded() if R.device == device]

            self.gauge(device).begin(_guarded(own), clip, there)

    def key(self, jobs: Sequence[Job]) -> Hashable:
        """What decides what the step launches for it, on which memory."""
        gauges = [self.gauge(device) for device in _by_device(jobs)]
        return tuple((g.values.data_ptr(), g.held and g.addresses()) for g in gauges)

    def end(self, jobs: Sequence[Job], states: States) -> None:
        """After a step. ``states`` gives those of all layers updated so far, by name."""
        for gauge in self._gauges.values():
            gauge.everything = list
        for device, own in _by_device(jobs).items():

            def there(device: torch.device = device) -> dict[str, dict[str, Tensor]]:
                return {n: s for n, s in states().items() if s[CLIPPED].device == device}

            self.gauge(device).end(_guarded(own), there)


def _by_device(jobs: Sequence[Job]) -> dict[torch.device, list[Job]]:
    by_device: dict[torch.device, list[Job]] = {}
    for job in jobs:
        by_device.setdefault(job.R.device, []).append(job)
    return by_device


def _guarded(jobs: Sequence[Job]) -> dict[int, Tensor]:
    return {job.index: job.R for job in jobs if job.clip}
