"""Gradient accumulation: one condensed weight A = W R for all micro-steps between two updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class _Holder:
    """What a layer has within the block: from its first pass on, its A.

    ``leaf`` is A cut off from W, so that the gradients of all micro-steps collect in it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.weight, self.R = layer._parameters.get("weight"), layer.R
        self.formed: Tensor | None = None
        self.leaf: Tensor | None = None
        self._versions = self._seen()

    def _seen(self) -> tuple[int, ...]:
        return tuple(
            t._version for t in (self.weight, self.R) if t is not None and not _untracked(t)
        )

    def serves(self, layer: nn.Module) -> bool:
        """Whether the layer's tensors are those of the beginning, and can be known to be as then.

        They are not where torch.func swaps others in, or a parametrisation computes the weight.
        """
        ours = layer.weight is self.weight and layer.R is self.R
        return ours and not _untracked(self.weight) and not _untracked(self.R)

    def form(self, condense: Callable[[], Tensor]) -> Tensor:
        """The leaf. Raises RuntimeError if W or R has changed."""
        self.check()
        if self.leaf is None:
            with torch.enable_grad():  # the first pass may be one without gradients
                self.formed = condense()
            self.leaf = self.formed.detach().requires_grad_(self.formed.requires_grad)
        return self.leaf

    def check(self) -> None:
        if self._seen() != self._versions:
            raise RuntimeError(
                "a weight or R was changed within accumulate_gradients(): expected the step() of "
                "every optimiser after the block"
            )


def _untracked(tensor: Tensor) -> bool:
    return tensor.is_inference()


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

    Within the block ``weight.grad`` is incomplete, hooks on it have not run, and
    ``torch.autograd.grad(loss, weight)`` finds no path. Passes under torch.compile,
    torch.inference_mode or torch.func, and layers whose weight is computed at every pass
    (parametrisations), do as they do without it.

    Args:
        model: a model, or a single layer. With DistributedDataParallel use it within ``no_sync()``,
            and leave the last, synchronised pass out.

    Raises:
        TypeError: model is no module.
        RuntimeError: it is under ``accumulate_gradients`` already, or is to synchronise gradients
            (DistributedDataParallel outside ``no_sync()``). Nothing is changed. In a layer's forward
            pass, and at the end: a weight or R has been changed within the block.

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
    for layer in layers:
        layer._holder = _Holder(layer)
    try:
        yield
    finally:
        holders = [layer.__dict__.pop("_holder") for layer in layers]
        holders = [h for h in holders if h.leaf is not None and h.leaf.grad is not None]
        for holder in holders:
            holder.check()
        if holders:
            torch.autograd.backward([h.formed for h in holders], [h.leaf.grad for h in holders])


def held_weight(layer: nn.Module, condense: Callable[[], Tensor]) -> Tensor | None:
    """The layer's A under ``accumulate_gradients``, by ``condense`` at first; None: form it anew."""
    holder = layer._holder
    if holder is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None or not holder.serves(layer):
        return None
    return holder.form(condense)
