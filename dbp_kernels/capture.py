"""Sampling: how a decorrelated layer hands images of the current batch to a DecorUpdate.

A layer holds no samples itself. It holds a weak reference to a `Recorder`, which belongs to the
optimiser: models therefore deep-copy and pickle without samples, and a layer whose optimiser has
been garbage-collected stops copying.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from dbp_kernels.clock import mark
from dbp_kernels.precision import computed_dtype

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

    def _sampling_options(self, group: int, index: int) -> dict[str, Any] | None:
        """The options of a group's layer, or None where this step copies nothing of it."""


class Recorder:
    """Keeps copies of one layer's sampled inputs until the optimiser's next ``step()``.

    Args:
        layer: the decorrelated layer it serves.
        owner: the optimiser, referenced weakly like the layer.
        group, index: the layer's parameter group, and its place there.

    ``seen`` counts the images that the samples were taken from.
    """

    def __init__(self, layer: nn.Module, owner: Owner, group: int, index: int) -> None:
        self.key = next(_next_key)
        self.samples: list[Tensor] = []
        self.seen = 0
        self.dtype: torch.dtype | None = None  # that the layer computed in, when last seen
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

    def clear(self) -> None:
        """Drop the samples; whoever works on them now keeps them."""
        self.samples = []
        self.seen = 0

    def release(self) -> None:
        """Drop the samples and stop recording."""
        self.clear()
        layer = self._layer()
        if layer is not None and self.owns_layer:
            layer._recorder = layer._recorder_key = None

    def record(self, input: Tensor, dtype: torch.dtype) -> None:
        """Copy the sampled images of one forward pass, free of any autograd graph, in a dtype.

        Raises RuntimeError while a CUDA graph is being captured.
        """
        # A recomputation by activation checkpointing runs inside a backward pass. Grad mode cannot
        # tell: the first pass of a reentrant checkpoint runs without it too.
        if torch._C._current_graph_task_id() != -1:
            return
        layer, owner = self._layer(), self._owner()
        options = None if owner is None else owner._sampling_options(*self._place)
        if layer is None or options is None:
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
            self.seen += images
            # A copy even of the whole batch: a view would keep the activation alive until step(),
            # and would see whatever the model does to it in place.
            if options["sampling"] == "random" and size < images:
                # on the CPU whatever the default device is: there its generator lives
                order = torch.randperm(images, generator=owner._generator, device="cpu")
                chosen = order[:size]
                self.samples.append(batch[chosen.to(batch.device, non_blocking=True)].to(dtype))
            else:
                self.samples.append(batch[:size].to(dtype, copy=True))
        if begin is not None:
            owner._budget.add_span(begin, mark(input.device))


def recorder_of(layer: nn.Module) -> Recorder | None:
    """The live recorder attached to a layer, if any."""
    reference = getattr(layer, "_recorder", None)  # a fused layer has lost the attribute
    return None if reference is None else reference()


def record(layer: nn.Module, input: Tensor) -> None:
    """Called by a layer after its forward pass; does nothing unless an optimiser is attached.

    Samples are what the layer computes with: under autocast not the float32 images a first layer is
    given, but what they are cast to.
    """
    if layer._recorder is None or not layer.training:
        return
    # Traces run on example inputs, which are no samples, and their graphs are for use elsewhere.
    if torch.compiler.is_compiling():
        if not _exporting():
            # cast here: autocast is a thing of the past when compiled code runs
            computed = input.detach().to(computed_dtype(input))
            torch.ops.dbp_nn.record(computed, layer._recorder_key)
        return
    if torch.jit.is_tracing() or isinstance(input, FakeTensor):
        return
    recorder = recorder_of(layer)
    if recorder is not None:
        recorder.record(input, computed_dtype(input))


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def _exporting() -> bool:
    # torch 2.11 compiles is_exporting(), which returns this flag, to true: nothing would be learnt
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def _capturing(input: Tensor) -> bool:
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


# The same under torch.compile: opaque, so that nothing in it is traced, guarded or recomputed. The
# key is declared mutated (it is not) to keep the call, which returns nothing, from being removed;
# it lives on the CPU, so that reading it never waits for a device. The tag keeps the call out of
# the compiler's CUDA graphs, whose replays would not run it.
_TAGS = tuple(getattr(torch.Tag, name) for name in ["cudagraph_unsafe"] if hasattr(torch.Tag, name))


@torch.library.custom_op("dbp_nn::record", mutates_args=("key",), tags=_TAGS)
def _record_op(input: Tensor, key: Tensor) -> None:
    recorder = _recorders.get(int(key))
    if recorder is not None:
        recorder.record(input, input.dtype)


@_record_op.register_fake
def _(input: Tensor, key: Tensor) -> None:
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
