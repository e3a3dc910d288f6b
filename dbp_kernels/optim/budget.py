"""A ``DecorUpdate``'s budget: what its steps cost and take, and the report on its ``Schedule``.

Times come from the host's clock, or on CUDA from events. They and the losses are read ``_LAG`` steps
later, by when a device has long computed them, so that ``step()`` does not wait; only before the
schedule's ``CALIBRATIONS`` and in checkpoints everything is read at once. Between those, decisions
use no measurement, so that equal states decide alike.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbp_kernels import distributed, user_warnings
from dbp_kernels.choose import update_choices
from dbp_kernels.clock import Mark, mark, seconds, wait
from dbp_kernels.loaded import StateError, is_int, is_number
from dbp_kernels.optim.schedule import (
    CALIBRATIONS,
    WARM_UP,
    Schedule,
    Sizes,
    are_layers,
    is_seconds,
)
from dbp_kernels.optim.step import Job
from dbp_kernels.planning import planner
from dbp_kernels.planning.geometry import ConvGeometry

# A sample is not made smaller than this, which keeps the largest eigenvalue of a sampled second
# moment, about D / n, in bounds. GUESS, not measured.
MIN_PATCHES = 64
_LAG = 8
_WINDOW = 256  # steps that the measured share is an average of
# Of the matmul rate, in a whole plain step. Two CPU cores, ConvNet and ResNet-18: 0.3 to 0.4.
_STEP_RATE = 0.35
# GUESS: what a layer's forward, backward, activation, norm and optimiser take beside arithmetic, in
# calls of the calibration, which are the fastest there are.
_STEP_CALLS = 250


@dataclass
class _Reading:
    """One step: its losses on their way to the host, and its marks."""

    layers: list[int]
    losses: list[Tensor]
    spans: list[tuple[Mark, Mark]]
    before: Mark | None  # the end of the step before
    end: Mark
    fences: list[Mark] = field(default_factory=list)

    def read_losses(self) -> list[float]:
        for fence in self.fences:
            wait(fence)
        return [value for losses in self.losses for value in losses.tolist()]

    def read_times(self) -> tuple[float, float] | None:
        """Seconds of the update, and of the whole step; None where there was no step before."""
        if self.before is None:
            return None
        return sum(seconds(*span) for span in self.spans), seconds(self.before, self.end)


@dataclass(frozen=True)
class LayerSchedule:
    """What the schedule does with one layer.

    ``images``: those sampled for one update, None before the first. ``seconds``: of one update.
    ``updates``: since the warm-up, ``interval``: steps from one to the next on average (None before
    the first). ``share``: of the time of all steps since the warm-up.
    """

    name: str
    images: int | None
    seconds: float
    updates: int
    interval: float | None
    share: float


@dataclass(frozen=True)
class ScheduleReport:
    """The result of ``DecorUpdate.schedule()``; prints as a table.

    ``budget``: the share of the step that was asked for. ``steps``: since the warm-up.
    ``step_seconds``: a step without any update (None during the warm-up). ``planned``: the share
    that the chosen updates take, by their costs; ``actual``: the measured one, over the last
    steps. Both None before the first step after the warm-up.
    """

    budget: float
    steps: int
    step_seconds: float | None
    planned: float | None
    actual: float | None
    layers: tuple[LayerSchedule, ...]

    def __str__(self) -> str:
        rows = [("layer", "images", "ms", "updates", "every", "of step")]
        rows += [
            (
                layer.name,
                "-" if layer.images is None else str(layer.images),
                f"{1e3 * layer.seconds:.2f}",
                str(layer.updates),
                "-" if layer.interval is None else f"{layer.interval:.1f}",
                f"{layer.share:.2%}",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        if self.planned is None:
            state = "warming up: every layer at every step"
        else:
            state = f"planned {self.planned:.2%}"
            state += "" if self.actual is None else f", measured {self.actual:.2%}"
            state += f", {self.steps} steps since the warm-up"
        if self.step_seconds is not None:
            state += f"; a step without updates: {1e3 * self.step_seconds:.1f} ms"
        return "\n".join([*lines, f"budget {self.budget:.2%} of a step; {state}"])


class Budget:
    """Measures a ``DecorUpdate``'s steps and keeps its schedule.

    Layers are numbered through all parameter groups. Args: the share of the step's time, and
    where costs come from, "measured" or "planned".
    """

    def __init__(self, share: float, costs: str) -> None:
        self.share = share
        self.costs = costs
        self.restart(0)

    def restart(self, layers: int) -> None:
        """Begin again, with the warm-up, for so many layers."""
        self.schedule = Schedule(self.share, layers)
        self.images = [0] * layers  # of the full sample
        self.plain = [0.0] * layers  # planned seconds of the plain layer's step
        self._choosing: list[tuple[Mark, Mark]] = []  # of the step to come
        self._spans: list[tuple[Mark, Mark]] = []  # of its copies
        self._end: Mark | None = None
        self._where: torch.device | None = None  # of that mark
        self._late = False  # whether a layer was planned when costs had been fixed
        self._pending: deque[_Reading] = deque()
        self._measured: list[tuple[list[int], float, float]] = []  # since the last calibration
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)

    # Asked by the recorders, in the forward pass.

    def options(self, layer: int, options: dict[str, Any]) -> dict[str, Any] | None:
        """The sampling options for the step to come; None: the layer has no update in it."""
        if layer not in self.schedule.chosen:
            return None
        part = self.schedule.part(layer)
        return options if part == 1 else {**options, "part": part}

    def add_span(self, begin: Mark, end: Mark) -> None:
        """Time that the update took, as part of the present step."""
        self._spans.append((begin, end))

    def discard(self) -> None:
        """Forget the copies' time: their samples were used, or freed."""
        self._spans.clear()

    def agree(self, process_group: dist.ProcessGroup | None) -> None:
        """Take over the schedule of the group's first rank: one clock for all."""
        self.schedule.load(distributed.of_first(self.schedule.state(), process_group))

    # Told by step().

    def plan(self, job: Job, recorded: int, many: bool) -> None:
        """Plan a layer's costs if that is still to do, from its first samples.

        Args:
            recorded: images that the samples were taken from.
            many: whether several processes add up their samples.
        """
        layer = job.index
        if self.schedule.sizes[layer] or not job.samples:
            return
        if many and self.schedule.step >= WARM_UP and self.schedule.step + 1 not in CALIBRATIONS:
            return  # ranks may differ in what they saw: until one decides for all
        self._late = self._late or self._fixed
        geometries, device, dtype = job.geometries()
        images = sum(int(sample.shape[0]) for sample in job.samples)
        self.images[layer] = images
        self.schedule.sizes[layer] = sample_sizes(geometries, images, device, dtype, many)
        patches = sum(geometry.samples for geometry in geometries) * recorded / images
        weight = getattr(job.layer, "weight", None)
        flop = 6 * patches * (0 if weight is None else weight.numel())
        machine = planner.machine(device.type)
        self.plain[layer] = flop / (machine.peak * _STEP_RATE) + _STEP_CALLS * machine.call

    @property
    def _fixed(self) -> bool:
        """Whether the costs are set for good."""
        return self.schedule.step >= CALIBRATIONS[-1]

    def finish(
        self,
        begin: Mark,
        device: torch.device,
        layers: list[int],
        losses: list[Tensor],
        possible: Sequence[int],
        every: Sequence[int],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        """Take note of a step, and choose the layers of the next one.

        Args:
            begin: when ``step()`` began, on ``device``.
            layers, losses: those updated.
            possible, every: the layers that the next step may update, and how often it can be.
        """
        end = mark(device)
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for layer, loss in zip(layers, losses):
            by_device.setdefault(loss.device, []).append((layer, loss))
        reading = _Reading(
            [layer for members in by_device.values() for layer, _ in members],
            [
                torch.stack([loss for _, loss in members]).to(
                    "cpu", non_blocking=members[0][1].is_cuda
                )
                for members in by_device.values()
            ],
            [*self._choosing, *self._spans, (begin, end)],
            self._end if self._where == device else None,  # or the model has moved
            end,
            [mark(device) for device in by_device],
        )
        self._pending.append(reading)
        self._end, self._where = end, device
        calibrate = self.schedule.step + 1 in CALIBRATIONS or self._late
        self._late = False
        while len(self._pending) > (0 if calibrate else _LAG):
            self._read(self._pending.popleft())
        if calibrate:
            self._calibrate(every, process_group)
        self.schedule.choose(possible, every)
        # choosing counts in the next step, which it is for; a calibration is rare enough not to
        self._choosing = [] if calibrate else [(end, mark(device))]

    def _read(self, reading: _Reading) -> None:
        for layer, loss in zip(reading.layers, reading.read_losses()):
            self.schedule.observe(layer, loss)
        times = reading.read_times()
        if times is None:
            return
        if not self._fixed:
            self._measured.append((reading.layers, *times))
        if self.schedule.base is not None:
            self._recent.append(times)

    def _calibrate(self, every: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        steps = self._measured
        if self.schedule.base is None:
            steps = steps[1:]  # the first ones allocate memory
        if self.costs == "planned" or torch.are_deterministic_algorithms_enabled():
            base, steps = sum(self.plain), []
        elif not steps:
            base = self.schedule.base or sum(self.plain)
        else:
            base = max(0.0, statistics.median(whole - update for _, update, whole in steps))
        self.schedule.calibrate(base, every, [(layers, update) for layers, update, _ in steps])
        self._measured = []
        if distributed.active(process_group):
            self.agree(process_group)
        if self.schedule.allowance == 0 and self.schedule.step + 1 == CALIBRATIONS[1]:
            assert self.schedule.base is not None  # since it was calibrated
            user_warnings.warn(
                f"budget={self.share:g} pays for no update: a step without any takes "
                f"{1e3 * self.schedule.base:.3g} ms, and choosing none already "
                f"{1e3 * self.schedule.overhead:.3g} ms",
                RuntimeWarning,
            )

    # What it reports, and its checkpoints.

    def report(self, names: Sequence[str]) -> ScheduleReport:
        schedule = self.schedule
        steps = max(0, schedule.step - WARM_UP)
        base = schedule.base
        # the coming step's are chosen, but not done
        done = [max(0, n - (i in schedule.chosen)) for i, n in enumerate(schedule.updates)]
        spent = [n * cost for n, cost in zip(done, schedule.costs())]
        update = sum(spent) + steps * schedule.overhead
        whole = update + steps * (base or 0.0)
        started = base is not None and steps > 0 and whole > 0
        layers = tuple(
            LayerSchedule(
                name,
                max(1, round(self.images[i] * schedule.part(i))) if self.images[i] else None,
                schedule.cost(i),
                done[i],
                steps / done[i] if done[i] else None,
                spent[i] / whole if started else 0.0,
            )
            for i, name in enumerate(names)
        )
        planned = update / whole if started else None
        return ScheduleReport(self.share, steps, base, planned, self._actual(), layers)

    def _actual(self) -> float | None:
        if self.schedule.base is None:
            return None
        pending = [reading.read_times() for reading in self._pending]
        times = [*self._recent, *filter(None, pending)][-_WINDOW:]
        if not times:
            return None
        update = statistics.fmean(update for update, _ in times)
        # a median: pauses for an evaluation or a checkpoint are no part of a step
        return update / (update + statistics.median(whole - update for update, whole in times))

    def state(self) -> dict[str, Any]:
        """In plain Python values; reads what is pending, without taking note of it yet."""
        return {
            "schedule": self.schedule.state(),
            "images": list(self.images),
            "plain": list(self.plain),
            "pending": [[list(r.layers), r.read_losses()] for r in self._pending],
        }

    def restored(self, state: Any) -> Budget:
        """A budget of the same share and layers that goes on from a ``state()``; None: anew.

        Raises ValueError naming the entry if it is not one of as many layers.
        """
        count = len(self.images)
        new = Budget(self.share, self.costs)
        new.restart(count)
        if state is None:
            return new
        keys = {"schedule", "images", "plain", "pending"}
        if not isinstance(state, dict) or state.keys() != keys:
            raise StateError(f"budget={state!r}: expected a dict with the keys {sorted(keys)}")
        for key, valid in (("images", is_int), ("plain", is_seconds)):
            values = state[key]
            if not isinstance(values, list) or len(values) != count or not all(map(valid, values)):
                raise StateError(
                    f"budget has {key}={values!r}: expected a number of at least 0 for each of "
                    f"{count} layers"
                )
        if not isinstance(state["pending"], list) or not all(
            _is_reading(entry, count) for entry in state["pending"]
        ):
            raise StateError(
                f"budget has pending={state['pending']!r}: expected lists of some of {count} layers "
                "and of their losses"
            )
        new.schedule.load(state["schedule"])
        new.images, new.plain = list(state["images"]), list(state["plain"])
        for layers, losses in state["pending"]:
            read = torch.tensor(losses, dtype=torch.float64)
            new._pending.append(_Reading(list(layers), [read], [], None, None))
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"share": self.share, "costs": self.costs, "state": self.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = Budget(state["share"], state["costs"])
        fresh.restart(len(state["state"]["images"]))
        vars(self).update(vars(fresh.restored(state["state"])))


def _is_reading(entry: Any, count: int) -> bool:
    """Whether it has layers and their losses, which may be NaN or Inf where an update was skipped."""
    if not isinstance(entry, list) or len(entry) != 2 or not are_layers(entry[0], count):
        return False
    losses = entry[1]
    numbers = isinstance(losses, list) and all(type(x) is float or is_number(x) for x in losses)
    return numbers and len(losses) == len(entry[0])


def sample_sizes(
    geometries: Sequence[ConvGeometry],
    images: int,
    device: torch.device,
    dtype: torch.dtype,
    gram_only: bool,
) -> Sizes:
    """(part of the sample, seconds of one update from it), halving down to ``MIN_PATCHES``.

    Args:
        geometries: of the full sample, of ``images`` images.
        gram_only: several processes: they add up second moments.
    """
    patches = sum(geometry.samples for geometry in geometries)
    sizes: list[tuple[float, float]] = []
    part = 1.0
    while not sizes or (images * part >= 1 and patches * part >= MIN_PATCHES):
        seconds = sum(
            _update_seconds(g, max(1, round(g.batch * part)), device, dtype, gram_only)
            for g in geometries
        )
        sizes.append((part, seconds))
        part /= 2
    return tuple(sizes)


def _update_seconds(
    geometry: ConvGeometry, batch: int, device: torch.device, dtype: torch.dtype, gram_only: bool
) -> float:
    geometry = geometry.with_batch(batch)
    choices = update_choices(geometry, device.type, dtype)
    plan = next(c for c in choices if c.name == "gram" or not gram_only)
    moved = 2 * dtype.itemsize * geometry.input_numel  # the copy of the samples
    moved += 3 * 4 * geometry.groups * geometry.dim**2  # R_new checked and written
    return plan.seconds + moved / planner.machine(device.type).bytes_per_second()
