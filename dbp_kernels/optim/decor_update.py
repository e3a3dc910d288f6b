"""DecorUpdate: the optimiser that learns every layer's R, beside any optimiser of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbp_kernels import distributed, precision
from dbp_kernels.clock import Mark, mark
from dbp_kernels.interrupts import carry_through, check_writable, uninterrupted
from dbp_kernels.optim.budget import Budget, Reading, ScheduleReport, sample_sizes
from dbp_kernels.optim.graphs import StepGraphs
from dbp_kernels.optim.guard import CLIPPED, SKIPPED, Guard
from dbp_kernels.optim.options import (
    as_groups,
    check_groups,
    check_own_R,
    check_R,
    checked_options,
    parse_group,
)
from dbp_kernels.optim.stagger import phases
from dbp_kernels.optim.state_dict import checked_generator
from dbp_kernels.optim.step import Batch, Job, local_updates, moments_of, update_from
from dbp_kernels.optim.streams import SideStreams
from dbp_kernels.optim.write_back import WriteBack
from dbp_kernels.sampling import Inputs, Layer, Recorder, recorder_of
from dbp_kernels.surgery import settle


class DecorUpdate(torch.optim.Optimizer):
    """Learns the decorrelating matrices R of a model's layers (DBP paper, arXiv 2405.02385, eq. 3).

    While it is attached, every decorrelated layer in training mode copies some images of its input
    in the forward pass; ``step()`` updates R from them, with C and V as the paper defines them:
    ``R <- R - lr [(1 - kappa) C + kappa V] R``::

        decor = dbp.DecorUpdate(model)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            decor.step()

    Learning-rate schedulers and parameter groups work as with any optimiser. Several forward passes
    before one ``step()`` (gradient accumulation, layers used twice) count together, patch by patch;
    recomputations by activation checkpointing do not count. Eval mode and
    passes without gradients (but a reentrant checkpoint's first) copy nothing. Where a
    ``step()`` is to be left out, call ``discard()`` to drop the samples. There are no gradients:
    with a `torch.amp.GradScaler`, call ``decor.step()`` directly.

    Under torch.compile, CUDA graphs included, samples are taken on every call. Capturing a training
    forward pass in a CUDA graph by hand raises RuntimeError: a replay would take no samples. Traces
    (torch.jit.trace, torch.export, fake tensors) take none.

    With torch.distributed initialised, ``step()`` uses the samples of all ranks, and all of them
    must call it. DDP is told to leave R alone; instead, the first ``step()`` makes every R that of
    the group's first rank.

    The samples' memory is kept for the next step's, as much as any step has needed, until
    ``detach()``. If a layer is called more than 64 times between two steps, the last 64 calls count,
    and one warning says so.

    With ``cuda_graph`` a step of a kind that has come before is done once more, and captured; later
    ones are replayed. Steps are of one kind if the same layers are due, with samples of the same
    number and shapes, and the same options. As samples keep their memory, kinds are few: each set of
    due layers is one, and so is an epoch's last, smaller batch. A kind that comes with another lr
    is captured once more, for every lr; its results then differ by rounding from those without a
    graph. Of more than 8 graphs those used last are kept, and one step in 100 is captured at most.
    A capture waits for the device and empties torch's cache. The work's memory, mostly a second copy
    of every R, then belongs to the graphs and no longer comes from what activations have left. If a
    capture fails, a warning says why, and steps are launched as without ``cuda_graph``. So they are
    on CPUs, where layers are on several devices, with several ranks, and in ``overlap()``.

    A layer belongs to one DecorUpdate, the last one made; ``step()`` of an earlier one raises.

    Args:
        model: a model; or an iterable of modules, or of (name, module) pairs; or a list of
            parameter groups ``{"modules": <any of these>, "lr": ..., ...}`` with values of their
            own for any of lr, kappa, sample, rule, update_every, demean, sampling and clip.
        lr: epsilon, the step size, >= 0. At 0 a layer is frozen and copies nothing. Of a tensor the
            value counts that it has now. The paper's is 1e-5, for 10^5 steps and more; in shorter
            trainings that does next to nothing, and what they take is about the default (with an
            update in every eighth step some seven times that): ``docs/when-it-helps.md``.
        kappa: from 0 (decorrelate only) to 1 (normalise variances only).
        sample: images taken from a batch: a float in (0, 1] is a fraction, at least one image; an
            int is a number of images. An image is an entry of the input's first dimension.
        rule: "standard", or "normalized" (divided by the layer's size).
        update_every: k: update at steps 0, k, 2k, ..., from those steps' samples only.
        demean: subtract the samples' mean from the statistics (not from the forward pass).
        process_group: the ranks to share samples with; None is the default group.
        sampling: "first" takes a contiguous slice (loaders shuffle), "random" draws images.
        budget: the share of the training step's time, between 0 and 1, that the update may take:
            its copies in the forward pass and ``step()``, over the whole step with them. Which
            layers are updated at which step, and from how many images, then follows; see
            ``schedule()``. The first 5 steps update every layer and are not charged; `sample` and
            `update_every` become upper limits. None: no limit, every layer whenever it is due.
        costs: "measured": the budget's costs are measured before steps 5, 15, 45 and 135 (which
            waits for the device, those four times), and kept then. "planned": they are the
            planner's estimates, so that equal runs update alike from the start, but the share
            holds only as well as those do; so too under torch.use_deterministic_algorithms.
        matmul_precision: the precision of the update's own products, under the names of
            torch.set_float32_matmul_precision: "highest" (float32), "high" (TF32 on GPUs) or
            "medium" (TF32 on GPUs; bfloat16 on CPUs where oneDNN makes that of it). R stays
            float32; what it changes by, and the losses, are that precise. None: float32 on CPUs;
            on GPUs what forms R S R^T is as exact as in float32, large products of it by three of
            TF32 in Triton's kernels (from patches in half precision S is of exact products), and
            M' R, by which R changes, is TF32. In TF32 the former would not let R converge where S
            is badly conditioned. None does not follow torch's own setting. That is the process's:
            updates in other threads that need another precision wait, and products of other threads
            that are not an update's may meanwhile have this one.
        stagger: with an `update_every` above 1, layers take turns: after the first step, which updates
            all, each is due at every k-th step, but not the same one, so that steps cost about the
            same. A budget does so by itself.
        clip: the most that one step may change R by, between 0 and 1, as ||lr M'||_F of each group; M'
            is (1 - kappa) C + kappa V as the rule weighs it. A larger step is made smaller to that, so
            that R stays invertible. With it, rows of R for inputs without any variance do not grow,
            and no row's norm passes 4096. `clipped` counts, and the first time warns. None: R changes
            by the plain rule, whatever becomes of it.
        cuda_graph: whether ``step()`` is to launch its work on a GPU as one CUDA graph, which takes
            the host little time. See above.

    Raises:
        ValueError: an option is out of range, there is no decorrelated layer, a layer is in two groups,
            two layers have one R, an R has another shape, or there is a budget with ``cuda_graph``.
            Nothing is changed.
        TypeError: the first argument has another form, or a layer's R is no floating-point tensor.
            Nothing is changed.
    """

    _inputs: Inputs | None = None  # every layer takes samples of its own
    _next_phases: list[int] | None = None  # chosen in the present step, for those after it

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        kappa: float = 0.5,
        sample: float | int = 0.1,
        rule: str = "standard",
        update_every: int = 1,
        demean: bool = False,
        process_group: dist.ProcessGroup | None = None,
        sampling: str = "first",
        budget: float | None = None,
        costs: str = "measured",
        matmul_precision: str | None = None,
        cuda_graph: bool = False,
        stagger: bool = False,
        clip: float | None = 0.5,
    ) -> None:
        limits = checked_options(
            {
                "budget": budget,
                "costs": costs,
                "matmul_precision": matmul_precision,
                "cuda_graph": cuda_graph,
                "stagger": stagger,
            }
        )
        if cuda_graph and budget is not None:
            raise ValueError(
                f"cuda_graph=True with budget={budget}, which chooses layers anew at every step: "
                "expected one of the two"
            )
        defaults = checked_options(
            {
                "lr": lr,
                "kappa": kappa,
                "sample": sample,
                "rule": rule,
                "update_every": update_every,
                "demean": demean,
                "sampling": sampling,
                "clip": clip,
            }
        )
        groups = as_groups(model)
        check_groups([parse_group(group, defaults) for group in groups])
        self.process_group = process_group
        self._layers: list[list[Layer]] = []  # parallel to param_groups
        self._recorders: list[list[Recorder]] = []
        self._generator = torch.Generator().manual_seed(torch.initial_seed())
        self._side = SideStreams()
        self._guard = Guard()
        self._matmul_precision = limits["matmul_precision"]
        self._graphs = StepGraphs() if cuda_graph else None
        self._stagger = limits["stagger"] and budget is None
        self._phases: list[int] | None = None  # all layers are due at once
        self._steps = 0
        self._ranks_agree = False
        self._told_of_pending = False
        self._gate: Tensor | None = (
            None  # whether the coming step() counts, known to the device only
        )
        self._budget = None if budget is None else Budget(limits["budget"], limits["costs"])
        super().__init__(groups, defaults)
        if isinstance(model, nn.Module):  # layers may have been placed by hand
            settle(model)

    # The layers.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add layers, with options of their own: ``{"modules": ..., "lr": ...}``.

        With a budget, its schedule begins again, with a warm-up. Raises ValueError as the
        constructor does, before anything is changed.
        """
        options, layers = parse_group(param_group, self.defaults)
        check_groups([(None, dict(self._named_layers())), (options, layers)])
        taken = {name for name, _ in self._named_layers()}
        index = len(self.param_groups)
        names = [f"group{index}.{name}" if name in taken else name for name in layers]
        params = [(name, layer.R) for name, layer in zip(names, layers.values())]
        super().add_param_group({**options, "params": params})
        self._layers.append(list(layers.values()))
        self._recorders.append(_make_recorders(layers.values(), self, index))
        self._phases = self._next_phases = None
        if self._budget is not None:
            self._budget.restart(sum(map(len, self._layers)))

    def _named_layers(self) -> Iterator[tuple[str, Layer]]:
        for group, layers in zip(self.param_groups, self._layers):
            yield from zip(group["param_names"], layers)

    def _follow_R(self) -> None:
        """Point param_groups and state at the Rs of today: model.to() replaces buffers.

        Raises RuntimeError if a layer was fused, TypeError or ValueError if an R was set to what is
        none, or to another layer's. Nothing is changed then.
        """
        params = [R for group in self.param_groups for R in group["params"]]
        changed = False
        for (name, layer), before in zip(self._named_layers(), params):
            if not hasattr(layer, "R"):
                raise RuntimeError(
                    f"layer {name!r} has no R: {_why_lost(layer)}; expected to be asked before that"
                )
            if layer.R is not before:
                check_R(name, layer)
                changed = True
        if not changed:
            return
        check_own_R(self._named_layers())
        for group, layers in zip(self.param_groups, self._layers):
            for index, (before, layer) in enumerate(zip(group["params"], layers)):
                if before is not layer.R:
                    if before in self.state and layer.R not in self.state:
                        state = self.state[before]  # of others, too, where they shared R
                        self.state[layer.R] = {
                            "loss": state["loss"].to(layer.R, copy=True),
                            **{
                                kind: state[kind].to(layer.R.device, copy=True)
                                for kind in (SKIPPED, CLIPPED)
                            },
                        }
                    group["params"][index] = layer.R  # last: an error above leaves all to do
        used = {id(layer.R) for _, layer in self._named_layers()}
        for gone in [R for R in self.state if id(R) not in used]:
            del self.state[gone]

    def _sampling_options(self, group: int, index: int) -> dict[str, Any] | None:
        """Asked by the recorders: a layer's options, or None where this step copies nothing."""
        options = self.param_groups[group]
        layer = sum(map(len, self._layers[:group])) + index
        if not self._due(options, layer):
            return None
        return options if self._budget is None else self._budget.options(layer, options)

    def _due(self, options: dict[str, Any], layer: int) -> bool:
        phase = 0 if self._phases is None else self._phases[layer]
        return bool((self._steps - phase) % options["update_every"] == 0 and options["lr"] != 0)

    def _turns(self, jobs: list[Job], many: bool) -> list[int]:
        """When each layer is due from the next step on, by what its update costs."""
        costs = [0.0] * sum(map(len, self._layers))
        for job in jobs:
            if job.samples:
                geometries, device, dtype = job.geometries()
                images = sum(int(sample.shape[0]) for sample in job.samples)
                costs[job.index] = sample_sizes(geometries, images, device, dtype, many)[0][1]
        every = [g["update_every"] for g, own in zip(self.param_groups, self._layers) for _ in own]
        turns = phases(costs, every)
        if many:
            turns = distributed.of_first(turns, self.process_group)
        return turns

    def discard(self) -> None:
        """Drop the samples taken since the last ``step()`` without using them."""
        for recorders in self._recorders:
            for recorder in recorders:
                recorder.clear()
        if self._budget is not None:
            self._budget.discard()

    def detach(self) -> None:
        """Stop copying samples, for good, and free those there are. R stays as it is."""
        for recorders in self._recorders:
            for recorder in recorders:
                recorder.release()
        if self._graphs is not None:
            self._graphs = StepGraphs()

    close = detach

    # The update.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every R from the samples taken since the last ``step()``, and drop those.

        Call it after ``backward()``, which needs the R of the forward pass: between the two it
        makes ``backward()`` raise. A layer without samples stays as it is, and so does one whose
        samples or result are not finite (see `skipped`). Nothing waits for the device (but see
        `costs`). Small layers of equal shape and options are computed together.

        Nothing is half done. Whatever raises, every R, the reports, the count of steps, turns and the
        budget's schedule are all as before the step, or all as after it (but for the first step's
        broadcast, below). R that cannot be written to is found before any changes. Of what changes
        them a call that raises is made again, then the rest, and the error raised at the end; only if
        the same call fails twice, as when a device is lost, are some changed and others not. Signals
        that have Python handlers (SIGINT and its KeyboardInterrupt, a program's own for SIGTERM,
        SIGALRM, SIGUSR1, ...) wait meanwhile: the handlers are called when all is done. So a
        checkpoint can be written wherever the error is caught. A step left before it began, by a
        signal, has kept its samples: `discard()` drops them.

        With several ranks, the first step (also after ``load_state_dict()``, and in a copy) sets
        every R to that of the group's first rank, then updates it from all ranks' samples. These
        samples, and the gradients of that one iteration, come from forward passes with each rank's
        own R; load or set R alike on all ranks beforehand where that matters.

        Args:
            closure: evaluated first, with gradients; for the forward pass that takes the samples.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a layer no longer belongs to this optimiser; or its R or reports cannot be
                written to in place, as they were expanded or made in inference mode.
            ValueError: a group's lr, kappa, rule or clip was set to what the constructor refuses, or
                an R to one of another shape, or to another layer's.
            TypeError: an R was set to no tensor, or one of less than float32.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        begin = None if self._budget is None else mark(self._device)
        try:
            jobs, many = self._due_jobs()
            if many or self._graphs is None or not self._by_graph(self._graphs, jobs):
                batches = self._work_out(jobs, many)
                with uninterrupted():
                    self._carry_out(jobs, batches, begin)
                    self.discard()
            self._guard.end(jobs, self._states)  # last, as its warnings may be made errors
            if self._budget is not None:
                self._budget.tell()
        finally:
            self.discard()
        return result

    @contextmanager
    def overlap(self) -> Iterator[None]:
        """A ``step()`` at the block's end, whose work GPUs do beside the block's own::

            loss = criterion(model(x), y)
            with decor.overlap():  # in place of decor.step()
                loss.backward()
                optimizer.step()

        The updates are computed on a CUDA stream of their own from the samples taken so far; R
        changes at the end of the block. The result is that of ``step()`` with the options at the
        block's beginning. What it costs is memory: the updates' temporaries exist beside the
        activations. Samples taken within the block are dropped. If the block raises, no R changes.
        On a CPU the work comes first, then the block. The hooks of ``step()`` are not called.

        With several ranks, the first time is a plain ``step()`` after the block, for its broadcast.
        With NCCL, gradients must be reduced in the same process group: two must not run at once.

        Raises:
            RuntimeError: the optimiser has a budget, whose measured costs know one stream only; or
                a layer's R was changed in the block, ``step()`` or ``load_state_dict()`` called
                (which stand; the block's own updates are dropped).
            As ``step()`` otherwise, before the block is entered.
        """
        if self._budget is not None:
            raise RuntimeError("overlap() with a budget: expected step()")
        try:
            if distributed.active(self.process_group) and not self._ranks_agree:
                yield
                self.step()
                return
            with (
                torch.no_grad(),
                self._side.fork({layer.R.device for _, layer in self._named_layers()}),
            ):
                jobs, many = self._due_jobs()
                batches = self._work_out(jobs, many)
            for _, _, recorder in self._places():  # forward passes in the block must not write to
                recorder.give_away()  # what is read beside it
            versions, steps = [(job.R, job.R._version) for job in jobs], self._steps
            yield
            self._side.join()
            self._check_unchanged(jobs, versions, steps)
            with torch.no_grad(), uninterrupted():
                self._carry_out(jobs, batches)
            self._opt_called = True  # what learning-rate schedulers look for
            self._guard.end(jobs, self._states)
        finally:
            self._side.close()
            self.discard()

    def _check_unchanged(
        self, jobs: list[Job], versions: list[tuple[Tensor, int]], steps: int
    ) -> None:
        same = all(
            job.layer.R is R and R._version == version for job, (R, version) in zip(jobs, versions)
        )
        if not same or self._steps != steps:
            raise RuntimeError(
                "within overlap() a layer's R was changed, or step() or load_state_dict() called: "
                "expected after it"
            )

    def _due_jobs(self) -> tuple[list[Job], bool]:
        """(the layers of this step, whether there are other ranks), checked; no R changes."""
        self._check_attached()
        self._follow_R()
        budget = self._budget
        many = distributed.active(self.process_group)
        if many and not self._ranks_agree:
            everything = [layer.R for _, layer in self._named_layers()]
            distributed.broadcast(everything, self.process_group)
            gpus = {R.device for R in everything if R.is_cuda}
            distributed.agree_on_backends(gpus, self.process_group)
            if budget is not None:
                budget.agree(self.process_group)
            self._ranks_agree = True
        jobs = self._jobs()
        for job in jobs:
            job.check()
        self._next_phases = None
        if self._stagger and self._phases is None and (many or any(job.samples for job in jobs)):
            self._next_phases = self._turns(jobs, many)
        self._guard.begin(jobs, self._guarded)
        if budget is not None:
            seen = [recorder.seen for recorders in self._recorders for recorder in recorders]
            with self._own_precision(jobs):
                budget.plan(jobs, seen, many)
        jobs = jobs if many else [job for job in jobs if job.samples]
        names = [name for name, _ in self._named_layers()]
        for job in jobs:
            check_writable(job.R, "R", names[job.index])
            for kind, report in self.state.get(job.R, {}).items():
                check_writable(report, kind, names[job.index])
        return jobs, many

    def _work_out(self, jobs: list[Job], many: bool) -> list[Batch]:
        """The updates of the jobs, if there are many ranks from the samples of all; no R changes."""
        with self._own_precision(jobs):
            return (self._reduced if many else local_updates)(jobs, self._gate)

    def _by_graph(self, graphs: StepGraphs, jobs: list[Job]) -> bool:
        """Whether a CUDA graph has done the step; else it is still to be done."""
        count = partial(self._count, self._steps + 1)

        def work(rates: Tensor | None) -> None:
            for job, rate in zip(jobs, len(jobs) * [None] if rates is None else rates.unbind()):
                job.rate = rate
            with self._own_precision(jobs):
                change = WriteBack(local_updates(jobs, self._gate), self._state_of, self._guard)
            carry_through(partial(self._write, jobs, change), count, *self._following())

        with uninterrupted():
            states = [self.state.get(job.R, {}) for job in jobs]
            also, written = self._followed()
            done = graphs.run(jobs, states, work, (also, self._guard.key(jobs)), written)
            if done:
                count()
                self.discard()
        return done

    def _count(self, steps: int) -> None:
        """So many steps have been made."""
        self._steps = steps
        if self._next_phases is not None:
            self._phases = self._next_phases

    def _following(self) -> list[Callable[[], None]]:
        """What else is to be done once R has changed; each may be called again."""
        return []

    def _followed(self) -> tuple[Hashable, Sequence[Tensor]]:
        """What decides what ``_following`` launches, and what it writes to."""
        return None, ()

    def _carry_out(self, jobs: list[Job], batches: list[Batch], begin: Mark | None = None) -> None:
        """All were worked out before any R changes, so that an error leaves every R as it was.

        Args:
            begin: when the step began, with a budget.
        """
        new = {job.R: new_state(job.R) for job in jobs if not self.state.get(job.R)}
        with self._own_precision(jobs):
            change = WriteBack(batches, lambda R: self.state.get(R) or new[R], self._guard)
        writes: list[Callable[[], None]] = [
            partial(self._write, jobs, change),
            partial(self._count, self._steps + 1),
            partial(self.state.update, new),
        ]
        if self._budget is not None:
            layers = {device: [job.index for job in own] for device, own in change.jobs.items()}
            reading = self._budget.read(layers, change.losses)
            writes.append(partial(self._end_budget_step, reading, begin))
        carry_through(*writes, *self._following())

    def _write(self, jobs: list[Job], change: WriteBack) -> None:
        with self._own_precision(jobs):
            change()

    @contextmanager
    def _own_precision(self, jobs: list[Job]) -> Iterator[None]:
        """Statistics and updates run in their own precision wherever step() is called."""
        with ExitStack() as stack:
            for device_type in {job.R.device.type for job in jobs}:
                if torch.amp.autocast_mode.is_autocast_available(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            cuda = any(precision.on_cuda(job.R) for job in jobs)
            stack.enter_context(precision.update_precision(self._matmul_precision, cuda))
            yield

    @property
    def _device(self) -> torch.device:
        return self._layers[0][0].R.device

    def _end_budget_step(self, reading: Reading, begin: Mark) -> None:
        """Tell the budget what this step did, and have the next one's layers chosen."""
        groups = [group for group, layers in zip(self.param_groups, self._layers) for _ in layers]
        assert self._budget is not None
        self._budget.finish(
            reading,
            begin,
            self._device,
            [index for index, group in enumerate(groups) if self._due(group, index)],
            [group["update_every"] for group in groups],
            self.process_group,
        )

    def _check_attached(self) -> None:
        recorders = [recorder for group in self._recorders for recorder in group]
        for (name, layer), recorder in zip(self._named_layers(), recorders):
            if not recorder.owns_layer:
                raise RuntimeError(
                    f"layer {name!r} no longer belongs to this DecorUpdate: {_why_lost(layer)}"
                )

    def _jobs(self) -> list[Job]:
        """The layers to update in this step, samples or not: the same ones on every rank."""
        return [
            Job(layer, recorder.samples, dict(options), index)  # as they are now: see overlap()
            for index, (place, layer, recorder) in enumerate(self._places())
            if (options := self._sampling_options(*place)) is not None
        ]

    def _places(self) -> Iterator[tuple[tuple[int, int], Layer, Recorder]]:
        """(group, place in it), layer and recorder, of all layers in their order."""
        for group, (layers, recorders) in enumerate(zip(self._layers, self._recorders)):
            for index, (layer, recorder) in enumerate(zip(layers, recorders)):
                yield (group, index), layer, recorder

    def _reduced(self, jobs: list[Job], gate: Tensor | None) -> list[Batch]:
        """The update of every job, from all ranks' samples."""
        batches = []
        shapes = [(job.R.device, job.R.dtype, *job.grouped_R.shape[:2], job.demean) for job in jobs]
        moments = map(moments_of, jobs)
        for job, total in zip(
            jobs, distributed.all_reduce(moments, shapes, self.process_group), strict=True
        ):
            some = total.count > 0
            batch = update_from(job, total)
            batch.sampled = some if gate is None else some & gate
            batches.append(batch)
        return batches

    def _state_of(self, R: Tensor) -> dict[str, Tensor]:
        if not self.state.get(R):
            self.state[R] = new_state(R)
        state: dict[str, Tensor] = self.state[R]
        return state

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """Of every layer updated so far, by name."""
        layers = ((name, self.state.get(layer.R)) for name, layer in self._named_layers())
        return {name: state for name, state in layers if state}

    def _guarded(self) -> list[Tensor]:
        """Every R that has a clip."""
        return [
            layer.R
            for group, layers in zip(self.param_groups, self._layers)
            if group["clip"] is not None
            for layer in layers
        ]

    # What it reports, and its checkpoints.

    def losses(self) -> dict[str, Tensor]:
        """The decorrelation loss of every layer updated so far, at its most recent update.

        0-dimensional tensors on the layers' devices, under the layers' names; the loss is that of
        the samples before R changed. A batch that was skipped reports its loss too (NaN or Inf).
        """
        return self._report("loss")

    def skipped(self) -> dict[str, Tensor]:
        """How many batches were left out as not finite, for every layer updated so far."""
        return self._report("skipped")

    def clipped(self) -> dict[str, Tensor]:
        """How many updates were made smaller, or had rows of R held, for every layer updated so far.

        See `clip`. Many of them say that lr is too large for the layer's input.
        """
        return self._report("clipped")

    def schedule(self) -> ScheduleReport:
        """What the budget has chosen so far, layer by layer; prints as a table.

        Waits for the device. Raises RuntimeError without a budget.
        """
        if self._budget is None:
            raise RuntimeError("this DecorUpdate has no budget: expected DecorUpdate(budget=...)")
        return self._budget.report([name for name, _ in self._named_layers()])

    def _report(self, key: str) -> dict[str, Tensor]:
        self._follow_R()
        return {
            name: self.state[layer.R][key].clone()  # step() writes in place
            for name, layer in self._named_layers()
            if layer.R in self.state
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, plus the step counter, the states of random sampling and budget.

        R belongs to the model's state_dict. Samples are not saved: take it after ``step()``.
        """
        self._follow_R()
        packed = super().state_dict()
        packed["state"] = {  # a snapshot: step() writes in place
            index: {key: value.clone() for key, value in state.items()}
            for index, state in packed["state"].items()
        }
        packed.update(steps=self._steps, generator=self._generator.get_state())
        if self._phases is not None:
            packed["phases"] = list(self._phases)
        if self._budget is not None:
            packed["budget"] = self._budget.state()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`: with the model's own, the run continues bit for bit.

        A budget keeps its share and goes on with the saved schedule, costs and sample sizes, or
        begins with a warm-up where none were saved.

        Raises ValueError, before anything is changed, if it is not of a DecorUpdate with the same
        groups of the same layers (their names may begin otherwise), or anything in it has another
        type or is out of range: an option, a count, a cost of the budget's schedule.
        """
        names = [group["param_names"] for group in self.param_groups]
        generator = checked_generator(state_dict, names, self.defaults)
        budget = self._budget
        if budget is not None:
            budget = budget.restored(state_dict.get("budget"))
        self._follow_R()
        plain = [  # as the constructor makes them: a step would take no int beyond 64 bits
            {
                **group,
                **checked_options({k: v for k, v in group.items() if not isinstance(v, Tensor)}),
            }
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "param_groups": plain})
        for group, own in zip(self.param_groups, names):
            group["param_names"] = own
            group.setdefault("clip", self.defaults["clip"])  # saved before there was one
        for R, state in self.state.items():  # torch casts all state to R's dtype, or shares it
            state["loss"] = state["loss"].clone()
            for kind in (SKIPPED, CLIPPED):
                count = state.get(kind, 0)  # saved before this kind was counted
                state[kind] = torch.as_tensor(count, dtype=torch.int64, device=R.device).clone()
        self._guard = Guard()
        self._steps = state_dict["steps"]
        self._phases, self._next_phases = state_dict.get("phases"), None
        self._generator.set_state(generator.get_state())
        self._ranks_agree = False
        self._budget = budget
        self.discard()

    def __getstate__(self) -> dict[str, Any]:
        self._follow_R()
        return {
            **super().__getstate__(),
            "process_group": self.process_group,
            "_layers": self._layers,
            "_steps": self._steps,
            # numbers: a spawned process is handed a tensor's memory, which must outlast the start
            "_generator": bytes(self._generator.get_state().tolist()),
            "_budget": self._budget,
            "_matmul_precision": self._matmul_precision,
            "_cuda_graph": self._graphs is not None,
            "_stagger": self._stagger,
            "_phases": self._phases,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_layers" not in state:  # torch's load_state_dict passes only part of the state
            super().__setstate__(state)
            return
        generator = torch.Generator()
        generator.set_state(torch.tensor(list(state["_generator"]), dtype=torch.uint8))
        graphed = state.pop("_cuda_graph", False)
        super().__setstate__(
            {
                "_budget": None,
                "_matmul_precision": None,
                "_stagger": False,
                "_phases": None,
                **state,
                "_generator": generator,
                "_ranks_agree": False,
                "_told_of_pending": False,
                "_gate": None,
                "_guard": Guard(),
                "_graphs": StepGraphs() if graphed else None,
                "_side": SideStreams(),
            }
        )
        self.defaults.setdefault("clip", None)  # pickled before there was one
        for group in self.param_groups:
            group.setdefault("clip", None)
        for entry in filter(None, self.state.values()):
            entry.setdefault(CLIPPED, torch.zeros_like(entry[SKIPPED]))
        # A copy that came with its model's copy; samples stay with the original.
        self._recorders = [
            _make_recorders(layers, self, index) for index, layers in enumerate(self._layers)
        ]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if "param" not in k)
            lines.append(f"  group {index}: {len(group['params'])} layers, {options}")
        if self._budget is not None:
            lines.append(f"  budget={self._budget.share:g}, costs={self._budget.costs!r}")
        if self._matmul_precision is not None:
            lines.append(f"  matmul_precision={self._matmul_precision!r}")
        if self._graphs is not None:
            lines.append("  cuda_graph=True")
        return "\n".join([*lines, ")"])


def new_state(R: Tensor) -> dict[str, Tensor]:
    """That of an R which has never been updated."""
    counts = {kind: R.new_zeros((), dtype=torch.int64) for kind in (SKIPPED, CLIPPED)}
    return {"loss": R.new_full((), math.nan), **counts}


def _make_recorders(layers: Iterable[Layer], owner: DecorUpdate, group: int) -> list[Recorder]:
    return [Recorder(layer, owner, group, index) for index, layer in enumerate(layers)]


def _why_lost(layer: Layer) -> str:
    """Why a layer that was ours is no longer."""
    if not hasattr(layer, "R"):
        return "it was fused, so that its weight is A = W R"
    if recorder_of(layer) is not None:
        return "a later DecorUpdate has taken it over"
    return "it was detached"
