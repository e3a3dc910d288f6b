"""Sampling: how a decorrelated layer hands images of the current batch to a DecorUpdate.

A layer holds no samples itself. It holds a weak reference to a `Recorder`, which belongs to the
optimiser: models therefore deep-copy and pickle without samples, and a layer whose optimiser has
been garbage-collected stops copying.

The memory of samples stays from step to step: nothing is allocated in a forward pass, and CUDA
graphs find the next samples where they found the last. Between a ``step()`` and the next forward
pass it is held without need.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import FunctionCtx
from torch.multiprocessing.reductions import StorageWeakRef

from dbp_kernels import backends, choose, user_warnings
from dbp_kernels.clock import mark
from dbp_kernels.op_input import OpInput
from dbp_kernels.phases import COPY, phase
from dbp_kernels.precision import computed_dtype
from dbp_kernels.sample_memory import SampleMemory

# Forward passes of one layer between two steps whose samples are kept; beyond it the oldest go.
MAX_PENDING = 64

_next_key = count()
_recorders: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()


def sample_size(sample: float | int, images: int) -> int:
    """Number of images to copy from a batch: a float is a fraction, an int a number of images."""
    if isinstance(sample, float):
        return min(images, max(1, round(sample * images)))
    return min(images, sample)


class Owner(Protocol):
    """What a recorder needs of its optimiser."""

    _generator: torch.Generator
    _budget: Any  # None, or what wants to know how long the copies take
    _told_of_pending: bool  # whether it has been told that MAX_PENDING was passed
    _inputs: Inputs | None  # None: every layer takes samples of its own

    def _sampling_options(self, group: int, index: int) -> dict[str, Any] | None:
        """The options of a group's layer, or None where this step copies nothing of it."""


class Sees(Protocol):
    """What sees its input as patches."""

    def _patch_geometry(self) -> dict[str, Any]: ...

    def _patch_size(self) -> tuple[int, int]: ...


class Layer(Sees, Protocol):
    """What is sampled, and learns: a decorrelated layer, or a site of ``attach``."""

    R: Tensor
    _recorder: weakref.ref[Recorder] | None
    _recorder_key: Tensor | None

    @property
    def training(self) -> bool: ...

    @property
    def _learns(self) -> bool: ...

    def _as_images(self, input: Tensor) -> Tensor: ...

    def _op_inputs(self, samples: Sequence[Tensor]) -> list[OpInput]: ...

    def _gradient(self) -> object: ...


class Inputs:
    """The samples taken since the last step by the tensors they are of, for layers fed by the same one.

    A tensor is known by its memory, its place and layout there, and its version. Nothing is kept
    alive for it, and yet no other can be taken for it: a weak reference to memory that has been freed
    is equal to none.
    """

    def __init__(self) -> None:
        self._taken: dict[Hashable, tuple[Recorder, Tensor]] = {}

    @staticmethod
    def key(images: Tensor) -> Hashable:
        """What tells the tensor from all others and from what it was or becomes; None: nothing does."""
        plain = type(images) is Tensor and images.layout == torch.strided
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(images)  # by torch.func
        if not plain or wrapped or images.is_inference():
            return None
        place = images.storage_offset(), images.shape, images.stride(), images.dtype
        return StorageWeakRef(images.untyped_storage()), *place, images._version

    def find(self, key: Hashable) -> tuple[Recorder, Tensor] | tuple[None, None]:
        """(who took it, the sample), if there is one under this key."""
        return self._taken.get(key, (None, None))

    def add(self, key: Hashable, taker: Recorder, sample: Tensor) -> None:
        self._taken[key] = taker, sample

    def forget(self, sample: Tensor, taker: Recorder) -> None:
        """Nobody else may have this sample from now on."""
        gone = [k for k, own in self._taken.items() if own[0] is taker and own[1] is sample]
        for key in gone:
            del self._taken[key]

    def clear(self) -> None:
        self._taken.clear()


def kind_of(layer: Sees) -> Hashable:
    """What layers have in common that see one input as the same patches."""
    window = layer._patch_geometry().items()
    return layer._patch_size(), *((k, tuple(v) if isinstance(v, list) else v) for k, v in window)


class Recorder:
    """Keeps copies of one layer's sampled inputs until the optimiser's next ``step()``.

    The n-th forward pass of a step writes where the n-th of the step before did, as long as its
    samples are laid out alike and fit. Where the owner has `Inputs`, a layer of the same kind that is
    fed the same tensor later holds the very same sample, in the memory of the first.

    Args:
        layer: the decorrelated layer it serves.
        owner: the optimiser, referenced weakly like the layer.
        group, index: the layer's parameter group, and its place there.
    """

    def __init__(self, layer: Layer, owner: Owner, group: int, index: int) -> None:
        self.key = next(_next_key)
        self.samples: list[Tensor] = []
        self.dtype: torch.dtype | None = None  # that the layer computed in, when last seen
        self._images: list[int] = []  # that each of the samples was taken from
        self._gradients: list[Any] = []  # what the layer's gradient was when each was taken
        # in the samples' order; None: the sample is in another's memory
        self._buffers: list[SampleMemory | None] = []
        self._lent: list[Tensor] = []  # samples that others hold, too
        self._layer = weakref.ref(layer)
        self._owner = weakref.ref(owner)
        self._place = group, index
        _recorders[self.key] = self
        layer._recorder = weakref.ref(self)
        # A tensor, not an int: an input of compiled code, so that one graph serves equal layers.
        layer._recorder_key = torch.tensor(self.key, device="cpu")

    @property
    def owns_layer(self) -> bool:
        """False once another optimiser has taken the layer over, or the layer is gone."""
        layer = self._layer()
        return layer is not None and recorder_of(layer) is self

    @property
    def seen(self) -> int:
        """How many images the samples were taken from."""
        return sum(self._images)

    @property
    def memory(self) -> list[Tensor]:
        """The samples, or, after they have been dropped, what the last of them looked like."""
        return self.samples or [held.images for held in self._buffers if held]

    def clear(self) -> None:
        """Drop the samples; the next forward passes write to their memory.

        Those that were lent must be dropped by all.
        """
        self.samples, self._images, self._gradients, self._lent = [], [], [], []
        owner = self._owner()
        if owner is not None and owner._inputs is not None:
            owner._inputs.clear()

    def drop_spent(self) -> None:
        """Drop samples whose gradient is there, and is about to be dropped as well."""
        layer = self._layer()
        if layer is None or not self.samples:
            return
        now = layer._gradient()
        self._drop([i for i, then in enumerate(self._gradients) if then != now])

    def _drop(self, places: list[int]) -> None:
        """Drop some samples; their memory is used again, after that of the others, if not lent."""
        owner = self._owner()
        for i in places:
            sample = self.samples[i]
            if owner is not None and owner._inputs is not None:
                owner._inputs.forget(sample, self)
            if any(sample is lent for lent in self._lent):
                self._buffers[i] = None
        order = [i for i in range(len(self.samples)) if i not in places]
        rest = self._buffers[len(self.samples) :]
        self._buffers = [self._buffers[i] for i in (*order, *places)] + rest
        self.samples = [self.samples[i] for i in order]
        self._images = [self._images[i] for i in order]
        self._gradients = [self._gradients[i] for i in order]

    def give_away(self) -> None:
        """Drop the samples and leave their memory to whoever works on them now."""
        self.clear()
        self._buffers = []

    def release(self) -> None:
        """Drop the samples with their memory, and stop recording."""
        self.give_away()
        layer = self._layer()
        if layer is not None and self.owns_layer:
            layer._recorder = layer._recorder_key = None

    @phase(COPY)
    def record(self, input: Tensor, dtype: torch.dtype, compiled: bool = False) -> None:
        """Copy the sampled images of one forward pass, free of any autograd graph, in a dtype.

        Args:
            compiled: the input is of compiled code, which may write to memory again unseen, and of
                which is known that a backward pass may follow.

        Raises RuntimeError while a CUDA graph is being captured.
        """
        # A recomputation by activation checkpointing runs inside a backward pass.
        if torch._C._current_graph_task_id() != -1 or not (compiled or _goes_backward()):
            return
        layer, owner = self._layer(), self._owner()
        if layer is None or owner is None:
            return
        options = owner._sampling_options(*self._place)
        if options is None:
            return
        if _capturing(input):
            raise RuntimeError(
                "a decorrelated layer attached to a DecorUpdate was called in training mode while "
                "a CUDA graph was being captured: samples would be taken at capture only, and no "
                "replay would ever learn; capture without it (decor.detach() or model.eval()), or "
                "use torch.compile, which keeps sampling out of its CUDA graphs"
            )
        self.dtype = dtype
        begin = None if owner._budget is None else mark(input.device)
        with torch.no_grad():
            batch = layer._as_images(_unwrapped(input).detach())
            images = int(batch.shape[0])
            size = sample_size(options["sample"], images)
            if size == 0:
                return
            size = max(1, round(size * options.get("part", 1)))  # with a budget
            self._make_room(owner)
            if compiled or owner._inputs is None:
                sample = self._take(batch, size, dtype, options["sampling"], owner)
            else:
                sample = self._share(batch, size, dtype, options["sampling"], owner, owner._inputs)
            self.samples.append(sample)
            self._images.append(images)
            self._gradients.append(layer._gradient())
        if begin is not None:
            owner._budget.add_span(begin, mark(input.device))

    def _share(
        self,
        batch: Tensor,
        size: int,
        dtype: torch.dtype,
        sampling: str,
        owner: Owner,
        inputs: Inputs,
    ) -> Tensor:
        """The sample that another layer of this kind took of the very tensor; else one of our own."""
        layer, key = self._layer(), Inputs.key(batch)
        if layer is None or key is None:
            return self._take(batch, size, dtype, sampling, owner)
        key = key, size, dtype, sampling, kind_of(layer)
        taker, sample = inputs.find(key)
        # one that is held already is of an earlier pass, which this one counts beside
        if taker is None or sample is None or any(sample is held for held in self.samples):
            sample = self._take(batch, size, dtype, sampling, owner)
            inputs.add(key, self, sample)
            return sample
        taker._lent.append(sample)
        place = len(self.samples)
        self._buffers[place : place + 1] = [None]
        return sample

    def _take(
        self, batch: Tensor, size: int, dtype: torch.dtype, sampling: str, owner: Owner
    ) -> Tensor:
        """A sample in memory of our own."""
        images = int(batch.shape[0])
        if sampling != "random" or size == images:
            return self._copy(batch, size, None, dtype)
        # on the CPU whatever the default device is: there its generator lives
        order = torch.randperm(images, generator=owner._generator, device="cpu")
        return self._copy(batch, size, order[:size].to(batch.device, non_blocking=True), dtype)

    def _copy(self, batch: Tensor, size: int, chosen: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The first ``size`` images, or the chosen ones, in the memory kept for the next sample.

        A copy even of the whole batch: a view would keep the activation alive until step(), and
        would see whatever the model does to it in place.
        """
        place = len(self.samples)
        memory = self._buffers[place] if place < len(self._buffers) else None
        if memory is not None and memory.fits(batch, size, dtype):
            return memory.write(batch, size, chosen)
        memory = SampleMemory(batch, size, chosen, dtype, *self._readers(batch, size, dtype))
        self._buffers[place : place + 1] = [memory]
        return memory.images

    def _readers(self, batch: Tensor, size: int, dtype: torch.dtype) -> tuple[str | None, int]:
        """The backend whose kernels will read the sample as rows of channels, if any, and their place.

        By what the planner thinks of this sample. If the step does otherwise, it reads it all the same.
        """
        layer, backend = self._layer(), backends.selected(batch.device)
        if layer is None or backend == "eager":
            return None, 1
        like = torch.empty((size, *batch.shape[1:]), dtype=dtype, device="meta")
        (seen,) = layer._op_inputs([like])
        reads = choose.reads_rows(seen.geometry, batch.device.type, dtype, backend)
        return backend if reads else None, 1 if seen.geometry.axes else batch.dim() - 1

    def _make_room(self, owner: Owner) -> None:
        """Drop the oldest sample if there are as many as are kept; its memory is used again."""
        if len(self.samples) < MAX_PENDING:
            return
        self._drop([0])
        if not owner._told_of_pending:
            owner._told_of_pending = True
            user_warnings.warn(
                f"a decorrelated layer has been called {MAX_PENDING + 1} times since the last "
                f"step() of its DecorUpdate: only the samples of the last {MAX_PENDING} calls are "
                "kept; call step() after every optimiser step, discard() where it is left out, or "
                "detach() to stop sampling",
                RuntimeWarning,
            )


def recorder_of(layer: Layer | nn.Module) -> Recorder | None:
    """The live recorder attached to a layer, if any."""
    reference = getattr(layer, "_recorder", None)  # a fused layer has lost the attribute
    return None if reference is None else reference()


def record(layer: Layer, input: Tensor) -> None:
    """Called by a layer after its forward pass; does nothing unless an optimiser is attached.

    Samples are what the layer computes with: under autocast not the float32 images a first layer is
    given, but what they are cast to.
    """
    if layer._recorder is None or not layer.training or not layer._learns:
        return
    # Traces run on example inputs, which are no samples, and their graphs are for use elsewhere.
    if torch.compiler.is_compiling():
        if not _exporting():
            # cast here: autocast is a thing of the past when compiled code runs
            computed = input.detach().to(computed_dtype(input))
            # asked here: a piece of compiled code that no gradient passes runs without them
            torch.ops.dbp_nn.record(computed, layer._recorder_key, torch.is_grad_enabled())
        return
    if torch._C._is_tracing() or isinstance(input, FakeTensor):
        return
    recorder = recorder_of(layer)
    if recorder is not None:
        recorder.record(input, computed_dtype(input))


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def _exporting() -> bool:
    # torch 2.11 compiles is_exporting(), which returns this flag, to true: nothing would be learnt
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def _goes_backward() -> bool:
    """Whether a backward pass may follow on this forward pass.

    Autograd functions run their forward passes without gradients: reentrant activation checkpoints,
    and code that was compiled for training.
    """
    if torch.is_grad_enabled():
        return True
    frame = None if torch.is_inference_mode_enabled() else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = code.co_varnames[0] if code.co_argcount else ""
        if code.co_name == "forward" and isinstance(frame.f_locals.get(first), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _capturing(input: Tensor) -> bool:
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


# The same under torch.compile: opaque, so that nothing in it is traced, guarded or recomputed. The
# key is declared mutated (it is not) to keep the call, which returns nothing, from being removed;
# it lives on the CPU, so that reading it never waits for a device. The tag keeps the call out of
# the compiler's CUDA graphs, whose replays would not run it.
_TAGS = tuple(getattr(torch.Tag, name) for name in ["cudagraph_unsafe"] if hasattr(torch.Tag, name))


@torch.library.custom_op("dbp_nn::record", mutates_args=("key",), tags=_TAGS)
def _record_op(input: Tensor, key: Tensor, gradients: bool) -> None:
    recorder = _recorders.get(int(key))
    if recorder is not None and (gradients or _goes_backward()):
        recorder.record(input, input.dtype, compiled=True)


@_record_op.register_fake
def _(input: Tensor, key: Tensor, gradients: bool) -> None:
    return None


def _unwrapped(input: Tensor) -> Tensor:
    """The plain tensor under torch.func's gradient wrappers; vmap's cannot be told apart later."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(input):
        input = functorch.get_unwrapped(input)
    if functorch.is_batchedtensor(input):
        raise RuntimeError(
            "a decorrelated layer attached to a DecorUpdate was called under torch.func.vmap in "
            "training mode, where its samples cannot be copied: call decor.detach() or "
            "model.eval() first"
        )
    if input.is_nested:
        raise TypeError("samples cannot be taken from a nested tensor; pad it first")
    return input
