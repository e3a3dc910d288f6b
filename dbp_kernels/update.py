"""DecorUpdate: the optimiser that learns every layer's R, beside any optimiser of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbp_kernels import distributed, functional, plans
from dbp_kernels.capture import Recorder
from dbp_kernels.nn import is_decorrelated
from dbp_kernels.surgery import switch_fast_paths

_SAMPLINGS = ("first", "random")


class DecorUpdate(torch.optim.Optimizer):
    """Learns the decorrelating matrices R of a model's layers (DBP paper, arXiv 2405.02385, eq. 3).

    While it is attached, every decorrelated layer in training mode copies some images of its input
    in the forward pass; ``step()`` updates R from them, with C and V as the paper defines them:
    ``R <- R - lr [(1 - kappa) C + kappa V] R``::

        decor = dbp.DecorUpdate(model, lr=1e-5)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            decor.step()

    Learning-rate schedulers and parameter groups work as with any optimiser. Several forward passes
    before one ``step()`` (gradient accumulation, layers used twice) count together, patch by patch;
    recomputations by activation checkpointing do not count. Eval mode copies nothing. Where a
    ``step()`` is to be left out, call ``discard()`` to free the samples. There are no gradients:
    with a `torch.amp.GradScaler`, call ``decor.step()`` directly.

    With torch.distributed initialised, ``step()`` uses the samples of all ranks, and all of them
    must call it. DDP is told to leave R alone; instead, the first ``step()`` makes every R that of
    the group's first rank.

    A layer belongs to one DecorUpdate, the last one made; ``step()`` of an earlier one raises.

    Args:
        model: a model; or an iterable of modules, or of (name, module) pairs; or a list of
            parameter groups ``{"modules": <any of these>, "lr": ..., ...}`` with values of their
            own for any of lr, kappa, sample, rule, update_every, demean and sampling.
        lr: epsilon, the step size, >= 0. At 0 a layer is frozen and copies nothing.
        kappa: from 0 (decorrelate only) to 1 (normalise variances only).
        sample: images taken from a batch: a float in (0, 1] is a fraction, at least one image; an
            int is a number of images. An image is an entry of the input's first dimension.
        rule: "standard", or "normalized" (divided by the layer's size).
        update_every: k: update at steps 0, k, 2k, ..., from those steps' samples only.
        demean: subtract the samples' mean from the statistics (not from the forward pass).
        process_group: the ranks to share samples with; None is the default group.
        sampling: "first" takes a contiguous slice (loaders shuffle), "random" draws images.

    Raises:
        ValueError: an option is out of range, there is no decorrelated layer, or a layer is in two
            groups. Nothing is changed.
        TypeError: the first argument has another form. Nothing is changed.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 1e-5,
        kappa: float = 0.5,
        sample: float | int = 0.1,
        rule: str = "standard",
        update_every: int = 1,
        demean: bool = False,
        process_group: dist.ProcessGroup | None = None,
        sampling: str = "first",
    ) -> None:
        defaults = _checked_options(
            {
                "lr": lr,
                "kappa": kappa,
                "sample": sample,
                "rule": rule,
                "update_every": update_every,
                "demean": demean,
                "sampling": sampling,
            }
        )
        groups = _as_groups(model)
        _check_groups([_parse_group(group, defaults) for group in groups])
        self.process_group = process_group
        self._layers: list[list[nn.Module]] = []  # parallel to param_groups
        self._recorders: list[list[Recorder]] = []
        self._generator = torch.Generator().manual_seed(torch.initial_seed())
        self._steps = 0
        self._ranks_agree = False
        super().__init__(groups, defaults)
        if isinstance(model, nn.Module):  # layers may have been placed by hand
            distributed.ignore_in_ddp(model)
            switch_fast_paths(model)

    # The layers.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add layers, with options of their own: ``{"modules": ..., "lr": ...}``.

        Raises ValueError as the constructor does, before anything is changed.
        """
        options, layers = _parse_group(param_group, self.defaults)
        _check_groups([(None, dict(self._named_layers())), (options, layers)])
        taken = {name for name, _ in self._named_layers()}
        index = len(self.param_groups)
        names = [f"group{index}.{name}" if name in taken else name for name in layers]
        params = [(name, layer.R) for name, layer in zip(names, layers.values())]
        super().add_param_group({**options, "params": params})
        self._layers.append(list(layers.values()))
        self._recorders.append([Recorder(layer, self, index) for layer in layers.values()])

    def _named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        for group, layers in zip(self.param_groups, self._layers):
            yield from zip(group["param_names"], layers)

    def _follow_R(self) -> None:
        """Point param_groups and state at the buffers of today: model.to() replaces buffers."""
        for group, layers in zip(self.param_groups, self._layers):
            for index, (before, layer) in enumerate(zip(group["params"], layers)):
                if before is not layer.R:
                    group["params"][index] = layer.R
                    if before in self.state:
                        state = self.state.pop(before)
                        self.state[layer.R] = {k: v.to(layer.R.device) for k, v in state.items()}

    def _sampling_options(self, group: int) -> dict[str, Any] | None:
        """Asked by the recorders: the group's options, or None where this step copies nothing."""
        options = self.param_groups[group]
        due = self._steps % options["update_every"] == 0 and options["lr"] != 0
        return options if due else None

    def discard(self) -> None:
        """Free the samples taken since the last ``step()`` without using them."""
        for recorders in self._recorders:
            for recorder in recorders:
                recorder.samples.clear()

    def detach(self) -> None:
        """Stop copying samples, for good, and free those there are. R stays as it is."""
        for recorders in self._recorders:
            for recorder in recorders:
                recorder.release()

    close = detach

    # The update.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every R from the samples taken since the last ``step()``, and free those.

        A layer without samples stays as it is, and so does one whose samples or result are not
        finite (see `skipped`). Nothing waits for the device. If an error is raised, no R has
        changed.

        Args:
            closure: evaluated first, with gradients; for the forward pass that takes the samples.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a layer no longer belongs to this optimiser.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        try:
            self._check_attached()
            self._follow_R()
            jobs = self._jobs()
            many = distributed.active(self.process_group)
            if many and not self._ranks_agree:
                everything = [layer.R for _, layer in self._named_layers()]
                distributed.broadcast(everything, self.process_group)
                self._ranks_agree = True
            with ExitStack() as stack:
                # Statistics and updates run in their own precision wherever step() is called.
                for device_type in {job.R.device.type for job in jobs}:
                    stack.enter_context(torch.autocast(device_type, enabled=False))
                # All computed before any is written, so that an error leaves every R as it was.
                if many:
                    updates = list(self._reduced(jobs))
                else:
                    jobs = [job for job in jobs if job.samples]
                    updates = [(*_local_update(job), None) for job in jobs]
            self._write(jobs, updates)
        finally:
            self.discard()
        self._steps += 1
        return result

    def _check_attached(self) -> None:
        recorders = [recorder for group in self._recorders for recorder in group]
        for (name, _), recorder in zip(self._named_layers(), recorders):
            if not recorder.owns_layer:
                raise RuntimeError(
                    f"layer {name!r} no longer belongs to this DecorUpdate: it was detached or "
                    "fused, or a later DecorUpdate has taken the layer over"
                )

    def _jobs(self) -> list[_Job]:
        """The layers to update in this step, samples or not: the same ones on every rank."""
        return [
            _Job(layer, recorder.samples, group)
            for index, group in enumerate(self.param_groups)
            if self._sampling_options(index) is not None
            for layer, recorder in zip(self._layers[index], self._recorders[index])
        ]

    def _reduced(self, jobs: list[_Job]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(R_new, loss, whether any rank had samples) of every job, from all ranks' samples."""
        shapes = [(job.R.device, job.R.dtype, *job.grouped_R.shape[:2], job.demean) for job in jobs]
        moments = map(_moments, jobs)
        for job, total in zip(
            jobs, distributed.all_reduce(moments, shapes, self.process_group), strict=True
        ):
            yield *_update_from(job, total), total.count > 0

    def _write(self, jobs: list[_Job], updates: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Write (R_new, loss, whether there were samples; None: yes) where the result is finite."""
        by_device: dict[torch.device, list[tuple[Any, ...]]] = {}
        for job, update in zip(jobs, updates):
            by_device.setdefault(job.R.device, []).append((job.R, *update))
        for results in by_device.values():
            Rs, Rs_new, losses, sampled = zip(*results)
            # A sum is not finite if an entry is not: one pass over R_new, no D x D temporary.
            finite = torch.isfinite(torch.stack([R.sum() for R in Rs_new]) + torch.stack(losses))
            accept, skip = finite, ~finite
            if sampled[0] is not None:
                some = torch.stack(sampled)
                accept, skip = finite & some, skip & some
            for R, R_new, ok in zip(Rs, Rs_new, accept.unbind()):
                torch.where(ok, R_new.reshape(R.shape), R, out=R)
            states = [self._state_of(R) for R in Rs]
            counts = torch._foreach_add(
                [state["skipped"] for state in states], list(skip.to(torch.int64).unbind())
            )
            for state, loss, some, count in zip(states, losses, sampled, counts):
                state["loss"] = loss if some is None else torch.where(some, loss, state["loss"])
                state["skipped"] = count

    def _state_of(self, R: Tensor) -> dict[str, Tensor]:
        state = self.state[R]
        if not state:
            state["loss"] = R.new_full((), math.nan)
            state["skipped"] = torch.zeros((), dtype=torch.int64, device=R.device)
        return state

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

    def _report(self, key: str) -> dict[str, Tensor]:
        self._follow_R()
        return {
            name: self.state[layer.R][key]
            for name, layer in self._named_layers()
            if layer.R in self.state
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, plus the step counter and the state of the random sampling.

        R belongs to the model's state_dict. Samples are not saved: take it after ``step()``.
        """
        self._follow_R()
        own = {"steps": self._steps, "generator": self._generator.get_state()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`: with the model's own, the run continues bit for bit.

        Raises ValueError, before anything is changed, if it is not of a DecorUpdate with the same
        groups.
        """
        missing = {"state", "param_groups", "steps", "generator"} - set(state_dict)
        if missing:
            raise ValueError(
                f"state_dict has no {sorted(missing)}; expected one of DecorUpdate.state_dict()"
            )
        self._follow_R()
        names = [group["param_names"] for group in self.param_groups]
        steps, generator = state_dict["steps"], state_dict["generator"].cpu()
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, names):
            group["param_names"] = own
        for state in self.state.values():  # torch casts all state to R's dtype
            state["skipped"] = state["skipped"].to(torch.int64)
        self._steps = steps
        self._generator.set_state(generator)
        self._ranks_agree = False
        self.discard()

    def __getstate__(self) -> dict[str, Any]:
        self._follow_R()
        return {
            **super().__getstate__(),
            "process_group": self.process_group,
            "_layers": self._layers,
            "_steps": self._steps,
            "_generator": self._generator.get_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_layers" not in state:  # torch's load_state_dict passes only part of the state
            super().__setstate__(state)
            return
        generator = torch.Generator()
        generator.set_state(state["_generator"])
        super().__setstate__({**state, "_generator": generator, "_ranks_agree": False})
        # A copy that came with its model's copy; samples stay with the original.
        self._recorders = [
            [Recorder(layer, self, index) for layer in layers]
            for index, layers in enumerate(self._layers)
        ]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v!r}" for k, v in group.items() if "param" not in k)
            lines.append(f"  group {index}: {len(group['params'])} layers, {options}")
        return "\n".join([*lines, ")"])


# Computing one layer's update.


@dataclass
class _Job:
    """One layer's update in one step."""

    layer: nn.Module
    samples: list[Tensor]
    options: dict[str, Any]

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

    def batches(self) -> list[Tensor]:
        """The samples in as few batches as their shapes allow, on R's device."""
        samples = [sample.to(self.R.device) for sample in self.samples]
        if not self.layer._patch_geometry()["kernel_size"]:
            samples = [sample.reshape(-1, sample.shape[-1]) for sample in samples]
        alike: dict[Any, list[Tensor]] = {}
        for sample in samples:
            alike.setdefault((sample.shape[1:], sample.dtype), []).append(sample)
        return [batch[0] if len(batch) == 1 else torch.cat(batch) for batch in alike.values()]


def _local_update(job: _Job) -> tuple[Tensor, Tensor]:
    """(R_new, loss) from this process's samples."""
    batches = job.batches()
    if len(batches) > 1:
        return _update_from(job, _moments(job))
    return functional.decor_update(
        batches[0], job.R, **job.layer._patch_geometry(), **job.rule, demean=job.demean
    )


def _moments(job: _Job) -> distributed.Moments:
    """Sums over all patches of the job's samples."""
    R = job.grouped_R
    total = distributed.Moments(
        torch.zeros_like(R), R.new_zeros(R.shape[:2]) if job.demean else None, R.new_zeros(())
    )
    for batch in job.batches():
        geometry = job.layer._patch_geometry()
        n = _patch_count(batch, geometry)
        total.second.add_(functional.patch_gram(batch, **geometry).to(R.dtype), alpha=n)
        if job.demean:
            total.first.add_(functional.patch_mean(batch, **geometry).to(R.dtype), alpha=n)
        total.count.add_(n)
    return total


def _update_from(job: _Job, moments: distributed.Moments) -> tuple[Tensor, Tensor]:
    R_new, loss = plans.update_from_gram(moments.mean(), job.grouped_R, **job.rule)
    return R_new, loss.mean()


def _patch_count(batch: Tensor, geometry: dict[str, Any]) -> int:
    """Number of patches in a batch of images."""
    kernel = geometry["kernel_size"]
    if not kernel:
        return batch.shape[0]
    one = (1,) * len(kernel)
    stride, dilation = geometry.get("stride", one), geometry.get("dilation", one)
    padding = geometry.get("padding", 0)
    if padding == "same":
        return batch.shape[0] * math.prod(batch.shape[2:])
    pads = (0,) * len(kernel) if padding in (0, "valid") else padding
    return batch.shape[0] * math.prod(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(batch.shape[2:], pads, dilation, kernel, stride)
    )


# The constructor's arguments.

_Layers = dict[str, nn.Module]


def _as_groups(model: Any) -> list[dict[str, Any]]:
    if isinstance(model, nn.Module):
        return [{"modules": model}]
    if isinstance(model, dict) or not isinstance(model, Iterable):
        raise TypeError(
            f"model={type(model).__name__}: expected a torch.nn.Module, an iterable of modules, or "
            "a list of groups {'modules': ..., 'lr': ...}"
        )
    entries = list(model)
    if entries and all(isinstance(entry, dict) for entry in entries):
        return entries
    return [{"modules": entries}]


def _parse_group(group: Any, defaults: dict[str, Any]) -> tuple[dict[str, Any], _Layers]:
    """(options, layers by name) of one group."""
    if not isinstance(group, dict) or "modules" not in group:
        raise TypeError(f"group={group!r}: expected a dict with the key 'modules'")
    options = {key: value for key, value in group.items() if key != "modules"}
    unknown = set(options) - set(defaults) - {"initial_lr"}
    if unknown:
        raise ValueError(f"group has unknown options {sorted(unknown)}: expected {list(defaults)}")
    layers: _Layers = {}
    for name, layer in _decorrelated_layers(group["modules"]):
        if layer not in layers.values():
            layers[name] = layer
    if not layers:
        raise ValueError(
            "found no decorrelated layer in the model or group: expected layers of "
            "dbp_kernels.nn; call dbp_kernels.decorrelate_model(model) first"
        )
    return _checked_options({**defaults, **options}), layers


def _decorrelated_layers(modules: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers of a module, or of an iterable of modules or (name, module) pairs."""
    if isinstance(modules, nn.Module):
        for name, module in distributed.unwrap(modules).named_modules():
            if is_decorrelated(module):
                yield name or type(module).__name__, module
        return
    if not isinstance(modules, Iterable):
        raise TypeError(f"modules={modules!r}: expected a torch.nn.Module or several")
    for index, entry in enumerate(modules):
        name, module = entry if isinstance(entry, tuple) and len(entry) == 2 else (index, entry)
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules contains {entry!r}: expected a torch.nn.Module")
        for inner, layer in distributed.unwrap(module).named_modules():
            if is_decorrelated(layer):
                yield ".".join(filter(None, (str(name), inner))) or type(layer).__name__, layer


def _check_groups(groups: list[tuple[Any, _Layers]]) -> None:
    seen: dict[nn.Module, str] = {}
    for _, layers in groups:
        for name, layer in layers.items():
            if layer in seen:
                raise ValueError(
                    f"layer {name!r} is in more than one group (also as {seen[layer]!r}): expected "
                    "every layer once"
                )
            seen[layer] = name


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options as plain Python values."""

    def check(name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}={options[name]!r}: expected {expected}")

    def is_number(value: Any, kind: type) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    lr, kappa, sample, every = (options[k] for k in ("lr", "kappa", "sample", "update_every"))
    check("lr", is_number(lr, Real) and 0 <= lr < math.inf, "a finite number of at least 0")
    check("kappa", is_number(kappa, Real) and 0 <= kappa <= 1, "a number from 0 to 1")
    check("rule", options["rule"] in plans.RULES, f"one of {plans.RULES}")
    check("update_every", is_number(every, Integral) and every >= 1, "an int of at least 1")
    check("demean", isinstance(options["demean"], bool), "True or False")
    check("sampling", options["sampling"] in _SAMPLINGS, f"one of {_SAMPLINGS}")
    whole = is_number(sample, Integral)
    check(
        "sample",
        sample >= 1 if whole else is_number(sample, Real) and 0 < sample <= 1,
        "a fraction above 0 and up to 1 (float), or a number of images of at least 1 (int)",
    )
    return {
        **options,
        "lr": float(lr),
        "kappa": float(kappa),
        "sample": int(sample) if whole else float(sample),
        "update_every": int(every),
    }
