"""A site: one weight of a model that holds A = W R, and what belongs to it, W and R."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dbp_kernels.interrupts import check_writable
from dbp_kernels.nn import identity_R, set_identity_
from dbp_kernels.op_input import OpInput, op_inputs
from dbp_kernels.optim.kinds import Patches, patches_of
from dbp_kernels.phases import BACKWARD, CONDENSE, phase, span
from dbp_kernels.precision import statistics_dtype
from dbp_kernels.products.rows_times import rows_times, rows_times_transposed
from dbp_kernels.sampling import Recorder, record, recorder_of

# Entries of each weight, spread over it, by which writes show that no version counter has counted.
# On a CPU that takes 8 us a step and layer, comparing all of a weight of 384 x 384 took 55.
PROBED = 256


@lru_cache
def _spread(entries: int) -> int:
    """Every so many-th is looked at."""
    step = -(-entries // PROBED)
    while math.gcd(step, entries) > 1:  # or it may come to the same columns only
        step += 1
    return step


class Feed:
    """A forward hook: hands a site samples of its layer's input.

    A copy of the model has copies of its hooks: those feed nobody.
    """

    def __init__(self, site: Site | None) -> None:
        self.site = site

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        site = self.site
        if site is not None and site.used_by(module):
            input = site.patches.input(arguments, named)
            if input is not None:
                record(site, input)

    def __deepcopy__(self, memo: dict[int, Any]) -> Feed:
        return Feed(None)

    def __reduce__(self) -> tuple[type[Feed], tuple[None]]:
        return Feed, (None,)


class GradientSeen:
    """A gradient as it is, without keeping it: unequal to any later one, be it in the same place."""

    __slots__ = ("_reference", "_version")

    def __init__(self, gradient: Tensor) -> None:
        self._reference, self._version = weakref.ref(gradient), gradient._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GradientSeen):
            return NotImplemented
        gradient = self._reference()
        same = gradient is not None and gradient is other._reference()
        return same and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


def is_fed(module: nn.Module) -> bool:
    """Whether the module feeds a site already, whose learner has not been garbage-collected."""
    hooks = (hook for hook in module._forward_hooks.values() if isinstance(hook, Feed))
    return any(hook.site is not None and recorder_of(hook.site) is not None for hook in hooks)


class Site:
    """A weight that holds A = W R outside of its optimiser's step, and W within it.

    The parameter stays the same object, and its memory outside of the step the same. To the engine
    that learns R it is a layer.

    Attributes:
        name: of the module, in the model.
        module, patches: the layer, and how it sees its input.
        weight: the parameter, which functional calls replace in the module.
        R: (D, D), or (groups, D, D) with groups > 1; at least float32.
            The same tensor as that of other sites with which it is shared.
        W: as the weight. Within the step it is the memory that the parameter points to.
        compared: whether sites that could share R have been looked for.
        highest_lr: the highest learning rate that the weight has had.
        lr_share: what the last one was of it.
    """

    _recorder: weakref.ref[Recorder] | None = None
    _recorder_key: Tensor | None = None

    def __init__(self, name: str, module: nn.Module, patches: Patches) -> None:
        self.name, self.module, self.patches = name, module, patches
        self.weight = module.get_parameter(patches.weight)
        weight = self.weight
        self.R = identity_R(patches.groups, patches.size, weight.device, weight.dtype)
        self.W = weight.detach().clone()
        self.compared = False
        self.highest_lr = 0.0
        self.lr_share = 1.0
        self._outside: tuple[Tensor, Tensor | None] | None = (
            None  # within the step: A's memory, dL/dA
        )
        self._inside = False  # the parameter's memory is W's
        self._transformed: Tensor | None = None  # a gradient that is W's already
        self._watch: RemovableHandle | None = None  # for gradients added to that
        self.formed()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy that comes with its module's: without samples, and what may not be pickled."""
        state = {**vars(self), "_written": self._seen() == self._written}
        for key in ("patches", "_recorder", "_recorder_key"):
            state.pop(key, None)
        state["_watch"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, patches=patches_of(state["module"]))
        self._written = self._seen() if state["_written"] else None

    def used_by(self, module: nn.Module) -> bool:
        """Whether the module has the weight just now, and not another, lent by a functional call.

        The weight may be there detached, or as torch.func wraps it; but not in compiled code, which
        cannot look through these.
        """
        weight: Any = module._parameters.get(self.patches.weight)  # None: pruned, parametrised
        if weight is None or weight is self.weight or torch.compiler.is_compiling():
            return weight is self.weight
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(weight):
            weight = functorch.get_unwrapped(weight)
        batched: bool = functorch.is_batchedtensor(weight)
        return not batched and weight.data_ptr() == self.weight.data_ptr()

    # What the engine that learns R asks a layer.

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def _learns(self) -> bool:
        return self.weight.requires_grad

    def _patch_geometry(self) -> dict[str, Any]:
        return self.patches.window

    def _op_inputs(self, samples: Sequence[Tensor]) -> list[OpInput]:
        """Such images as the statistics take them."""
        return op_inputs(samples, self.patches.window)

    def _patch_size(self) -> tuple[int, int]:
        return self.patches.groups, self.patches.size

    def _as_images(self, input: Tensor) -> Tensor:
        """The input with a leading dimension to sample along."""
        unbatched = input.dim() <= max(1, self.patches.dims + 1)
        return input.unsqueeze(0) if unbatched else input

    def _gradient(self) -> GradientSeen | None:
        """What changes with the weight's gradient."""
        gradient = self.weight.grad
        return None if gradient is None else GradientSeen(gradient)

    # A, W and their gradients.

    def saw_lr(self, lr: Any) -> None:
        """The weight has made a step at this learning rate. Not counted where it cannot be read."""
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            lr = float(lr)
        if isinstance(lr, (int, float)) and 0 <= lr < math.inf:
            self.highest_lr = max(self.highest_lr, lr)
            self.lr_share = lr / self.highest_lr if lr else float(not self.highest_lr)

    def check(self) -> None:
        """Raises RuntimeError if the step could not write to what it is to change."""
        for tensor, what in ((self.weight, self.patches.weight), (self.W, "W"), (self.R, "R")):
            check_writable(tensor, what, self.name)

    def gradient_to_step(self) -> Tensor | None:
        """dL/dW = dL/dA R^T, if there is a gradient."""
        dA = self.weight.grad
        return dA if dA is None or dA is self._transformed else self.gradient_of_W(dA)

    def enter(self, gradient: Tensor | None) -> None:
        """The parameter becomes W, its gradient this one; ``leave()`` knows how far this came."""
        weight = self.weight
        self._outside = weight.data, weight.grad
        weight.grad = gradient
        weight.data = self.W
        self._inside = True

    def transform(self) -> None:
        """The gradient becomes dL/dW before the step, which will take it as such."""
        gradient = self.weight.grad
        if gradient is not None and gradient is not self._transformed:
            self.to_follow()
            self._transformed = self.weight.grad = self.gradient_of_W(gradient)
            self._watch = self.weight.register_hook(self._added_to)

    def _added_to(self, _: Tensor) -> None:
        """Before a backward pass adds to the gradient: it is dL/dA again, if it began anew."""
        gradient, transformed = self.weight.grad, self._transformed
        if gradient is transformed and gradient is not None and gradient.any():
            raise RuntimeError(
                f"backward() after transform_gradients(): the gradient of {self.name!r} is dL/dW already, "
                "and dL/dA cannot be added to it; expected step() and zero_grad() before, or "
                "transform_gradients() after the last backward()"
            )
        self.forget_transformed()

    def forget_transformed(self) -> None:
        """What collects from now on is dL/dA again, even if in the same memory."""
        self._transformed = None
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def leave(self) -> None:
        """The parameter becomes A again, as it was, and its gradient is dL/dA.

        Whatever has interrupted this, it can be called again.
        """
        if self._outside is None:
            return
        weight = self.weight
        if self._inside:
            self.W = weight.data
            self._inside = False
        weight.data, weight.grad = self._outside
        self._outside = None

    def form(self) -> None:
        """A = W R, in the parameter's memory. Passes from before can no longer go backward."""
        weight = self.weight.detach()  # with its version counter
        with span(CONDENSE):
            weight.copy_(self.condensed())

    def layout(self) -> Hashable:
        """What decides what ``form`` launches, and on which memory."""
        weight = self.weight
        tensors = ((t.data_ptr(), t.stride()) for t in (weight, self.W, self.R))
        return *tensors, weight.dtype, self.rounded

    def formed(self) -> None:
        """Called after every change that is not somebody else's."""
        self._written = self._seen()
        probe = self._probe()
        self._probed = None if probe is None else probe.clone()

    def _seen(self) -> tuple[int, int]:
        """By which a write of somebody else's shows, unless it goes through ``.data``."""
        return self.weight.data_ptr(), self.weight._version

    def _probe(self) -> Tensor | None:
        """Some entries, by which that shows, too; None: on a GPU, where looking would wait."""
        weight = self.weight.detach()
        if not weight.is_cpu:
            return None
        if not weight.is_contiguous():
            order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
            weight = weight.permute(order)
        return weight.view(-1)[:: _spread(weight.numel())] if weight.is_contiguous() else None

    def _untouched(self) -> bool:
        if self._seen() != self._written:
            return False
        now, then = self._probe(), self._probed
        if now is None or then is None or torch.equal(now, then):
            return True
        return torch.equal(now.clone().view(torch.uint8), then.view(torch.uint8))  # NaNs, too

    @torch.no_grad()
    def take_over(self) -> bool:
        """Whether somebody has written to the weight, and not A: W is then what gives it.

        Waits for the device if somebody has written at all.
        """
        if self._untouched():
            return False
        self.to_follow()
        weight = self.weight.detach()
        largest = float(weight.abs().nan_to_num(0.0, 0.0).max())
        tolerance = 8 * torch.finfo(weight.dtype).eps * largest
        if torch.allclose(weight, self.condensed(), rtol=0, atol=tolerance, equal_nan=True):
            return False
        A, R = self._grouped(weight).double(), self.R.double()
        # a solve, not an inverse: A = W R, or R^T W
        W = torch.linalg.solve(R.mT, A if self.patches.transposed else A.mT)
        W = W if self.patches.transposed else W.mT
        self.W.copy_(W.reshape(self.W.shape))
        return True

    def condensed(self) -> Tensor:
        """A = W R, in the weight's dtype."""
        W, R = self._grouped(self.W), self.R
        A = R.mT @ W if self.patches.transposed else rows_times(W, R) if R.dim() == 2 else W @ R
        return A.reshape(self.W.shape).to(self.W.dtype)

    @phase(BACKWARD)
    def gradient_of_W(self, dA: Tensor) -> Tensor:
        """dL/dW = dL/dA R^T, in the gradient's dtype and its very layout, as fused optimisers want."""
        D, R = self._grouped(dA), self.R
        if self.patches.transposed:
            dW = R @ D
        else:
            dW = rows_times_transposed(D, R) if R.dim() == 2 else D @ R.mT
        dW = dW.to(dA.dtype).reshape(dA.shape)
        if dW.stride() == dA.stride():
            return dW
        return torch.empty_like(dA).copy_(dW)

    def _grouped(self, weight: Tensor) -> Tensor:
        """A weight or its gradient as (out, D), or (groups, out, D); transposed (D, out) of each."""
        groups, size = self._patch_size()
        batch = () if groups == 1 else (groups,)
        rows = (size, -1) if self.patches.transposed else (-1, size)
        return weight.to(self.R.dtype).reshape(*batch, *rows)

    @property
    def rounded(self) -> bool:
        """Whether the layer computes in half precision: products in TF32 will do then."""
        recorder = recorder_of(self)
        return recorder is not None and recorder.dtype in (torch.float16, torch.bfloat16)

    @torch.no_grad()
    def reset(self) -> None:
        """R = I, and W is the weight as it is."""
        self.W.copy_(self.weight)
        set_identity_(self.R)

    def to_follow(self) -> None:
        """After model.to(): W and R go where the parameter has gone, and W has its memory layout."""
        weight, W = self.weight.detach(), self.W
        if (weight.device, weight.dtype, weight.stride()) != (W.device, W.dtype, W.stride()):
            self.W = torch.empty_like(weight).copy_(W)
        R = self.R.to(weight.device, statistics_dtype(weight.dtype))
        if R is not self.R:
            self.R, self.compared = R, False
