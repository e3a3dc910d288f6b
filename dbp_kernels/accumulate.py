"""Gradient accumulation: one condensed weight A = W R for all micro-steps between two updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook


class _Holder:
    """What a layer has within the block: from its first pass on, its A.

    ``leaf`` is A cut off from W, so that the gradients of all micro-steps collect in it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.weight, self.R = layer._parameters.get("weight"), layer.R
        self.formed: Tensor | None = None
        self.leaf: Tensor | None = None
        self.ended = False
        self._versions = self._seen()

    def _seen(self) -> tuple[int, ...]:
        tensors = (t for t in (self.weight, self.R) if t is not None)
        return tuple(t._version for t in tensors if not t.is_inference())  # those have no version

    def serves(self, layer: nn.Module) -> bool:
        """Whether the layer's tensors are those of the beginning, and can be known to be as then.

        They are not where torch.func swaps others in, a parametrisation computes the weight (which
        is not asked for here: that may change its state), or the weight was frozen or freed since.
        """
        # by the dictionary: a parametrisation has taken the weight out of it
        own = self.weight is not None and layer._parameters.get("weight") is self.weight
        if not own or layer.R is not self.R or self.weight.is_inference() or self.R.is_inference():
            return False
        return self.leaf is None or self.leaf.requires_grad == self._learns

    @property
    def _learns(self) -> bool:
        return self.weight.requires_grad or self.R.requires_grad

    def form(self, layer: nn.Module) -> Tensor:
        """The leaf. Raises RuntimeError if W or R has changed."""
        if self.changed:
            raise RuntimeError(_CHANGED)
        if self.leaf is None:
            # The first pass may be one without gradients, or of a checkpoint, whose hooks on what
            # is saved expect the same again in the recomputation.
            keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            with torch.enable_grad(), keep:
                self.formed = layer._condense()
            self.leaf = self.formed.detach().requires_grad_(self.formed.requires_grad)
            if self.leaf.requires_grad:
                self.leaf.register_hook(self._collect)
        return self.leaf

    def _collect(self, gradient: Tensor) -> None:
        if self.ended:
            raise RuntimeError(
                "backward() of a pass under accumulate_gradients() after its end: expected it "
                "within the block"
            )

    @property
    def changed(self) -> bool:
        return self._seen() != self._versions


_CHANGED = (
    "a weight or R was changed within accumulate_gradients(): expected the step() of every "
    "optimiser after the block"
)


@contextmanager
def _no_step(holders: list[_Holder]) -> Iterator[None]:
    """Makes the step() of any optimiser of what is held raise before it does anything.

    With no gradient in ``weight.grad`` it would pass the weights over, and say nothing.
    """
    held = {id(t) for h in holders for t in (h.weight, h.R) if t is not None}

    def refuse(optimizer: torch.optim.Optimizer, *arguments) -> None:
        if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() within accumulate_gradients(): expected it "
                "after the block, at whose end the gradients are complete"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _pass_on(holders: list[_Holder]) -> None:
    """Adds what the leaves have collected to the gradients of W, and of R if it has one."""
    holders = [h for h in holders if h.leaf is not None and h.leaf.grad is not None]
    # what was learnt from before it was frozen counts, as it does without us
    frozen = [h.weight for h in holders if not h.weight.requires_grad and not h.R.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        if holders:
            torch.autograd.backward([h.formed for h in holders], [h.leaf.grad for h in holders])
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def accumulate_gradients(model: nn.Module) -> Iterator[None]:
    """Form each layer's A = W R once for several forward and backward passes, not at every one::

        with dbp.accumulate_gradients(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()
        decor.step()

    Outputs are the same; the gradients are too, up to the order of summation. Within the block the
    gradient of a layer's weight collects as that of A; at its end one product, (dL/dA) R^T, adds
    them to ``weight.grad``, also when the block is left by an exception. So for k micro-steps the
    two products of each are done once instead of k times. Samples for a DecorUpdate are taken as
    ever.

    Within the block ``weight.grad`` is incomplete, and hooks on it have not run: ``zero_grad()``
    belongs in front of it, clipping, ``GradScaler.unscale_()`` and ``step()`` after it.
    ``torch.autograd.grad(loss, weight)`` and ``backward(inputs=[weight])`` find no path. Passes under
    torch.compile, torch.inference_mode or torch.func, and layers whose weight is computed at every
    pass (parametrisations), do as they do without it.

    Args:
        model: a model, or a single layer. With DistributedDataParallel give the wrapped model, have
            the whole block within ``no_sync()``, and the last, synchronised pass after both.

    Raises:
        TypeError: model is no module.
        RuntimeError: it is under ``accumulate_gradients`` already, or is to synchronise gradients
            (DistributedDataParallel outside ``no_sync()``). Nothing is changed. Within the block, in
            the place where it is noticed: ``step()`` of an optimiser of the model, or a weight or R
            changed otherwise. After it: ``backward()`` of a pass from within.

    Source: DBP paper (arXiv 2405.02385), section 2.2, for A; the rest is the chain rule.
    """
    from dbp_kernels.nn import is_decorrelated

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync:
            raise RuntimeError(
                "accumulate_gradients() around a DistributedDataParallel that synchronises its "
                "gradients: expected it within no_sync()"
            )
    layers = [module for module in model.modules() if is_decorrelated(module)]
    if any(layer._holder is not None for layer in layers):
        raise RuntimeError("accumulate_gradients(): the model is under it already")
    holders = [_Holder(layer) for layer in layers]
    for layer, holder in zip(layers, holders):
        layer._holder = holder

    def end() -> None:
        for layer, holder in zip(layers, holders):
            layer.__dict__.pop("_holder")
            holder.ended = True
        _pass_on([holder for holder in holders if not holder.changed])

    try:
        with _no_step(holders):
            yield
    except BaseException:
        end()
        raise
    end()
    if any(holder.changed for holder in holders if holder.leaf is not None):
        raise RuntimeError(_CHANGED)


def held_weight(layer: nn.Module) -> Tensor | None:
    """The layer's A under ``accumulate_gradients``; None: it is to be formed anew."""
    holder = layer._holder
    if holder is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or not holder.serves(layer):
        return None
    return holder.form(layer)
