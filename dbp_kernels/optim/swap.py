"""Around an optimiser's ``step()``: W takes A's place in the parameters, and A comes back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import user_warnings
from dbp_kernels.interrupts import uninterrupted
from dbp_kernels.optim.site import Site
from dbp_kernels.precision import tf32_products
from dbp_kernels.sampling import recorder_of


@contextmanager
def in_own_precision(sites: Sequence[Site]) -> Iterator[None]:
    """Within it A and dL/dW are formed: without autocast, and in TF32 if A is rounded anyway.

    That is where all layers computed in half precision, as under autocast; so their gradients, too,
    were rounded to less than TF32 is.
    """
    with ExitStack() as stack:
        if sites and all(site.W.is_cuda and site.rounded for site in sites):
            stack.enter_context(tf32_products())
        for device_type in {site.W.device.type for site in sites}:
            if torch.amp.autocast_mode.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@torch.no_grad()
def form(sites: Sequence[Site]) -> None:
    """A = W R in the parameters of all sites."""
    with in_own_precision(sites):
        for site in sites:
            site.form()


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more layers"


class Swap:
    """Has an optimiser step on W, while everything else sees A = W R.

    The hooks of ``step()`` do it, because wrappers of ``step()`` come and go (schedulers and
    accelerate put theirs on the instance, and take them off). Post hooks do not run where a step
    raises: that alone is seen by a wrapper on the instance, and if even that was taken off, by the
    next forward pass.

    Args:
        optimizer: the weights'.
        sites: of its parameters.
        after: hook of its ``step()``, called with this and what such hooks are: asks whether the step
            `is_over`, and then has A formed anew.
        joined: called with every group that is added later.

    Samples go with their gradient: ``zero_grad()`` drops those whose backward pass has been, which
    are left there where a step was skipped (by a GradScaler, say).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sites: Sequence[Site],
        after: Callable[..., None],
        joined: Callable[[dict[str, Any]], None],
    ) -> None:
        self._optimizer, self.sites = optimizer, sites
        self._depth = 0  # subclasses' step() calls that of super(), whose hooks run too
        self._inside = False  # from when W takes A's place until A is formed
        self._initialising = False
        self.found_inf: Tensor | None = None  # of the last step
        self._evaluations: int | None = None  # of the closure, if there is one
        self._evaluating = False  # the closure just now
        # compiled steps break off here: to trace all that learns R would take them many seconds
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(
                torch.compiler.disable(functools.partial(after, self))
            ),
        ]
        self._wrapped: list[tuple[str, Any, Any]] = []
        self._wrap("step", self._with_recovery)
        self._wrap("zero_grad", self._with_drop)
        self._wrap("add_param_group", functools.partial(self._with_telling, joined))

    def remove(self) -> None:
        """From now on the optimiser steps on what the parameters hold."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        own = vars(self._optimizer)
        for name, ours, before in self._wrapped:
            if own.get(name) is not ours:
                continue  # somebody has wrapped it once more: below that it does no harm
            if before is None:
                del own[name]
            else:
                own[name] = before
        self._handles, self._wrapped = [], []  # which hold the optimiser, as it did us

    def recover(self) -> None:
        """A into the parameters, of wherever the weights are, if a step was left by an exception."""
        with uninterrupted():
            if self._inside:
                self._leave()
                self.form()
            self._depth = 0
            self._initialising = False
            self._evaluations = None

    def recover_if_left(self) -> None:
        """``recover()`` where a forward pass comes in the middle of a step that no closure makes."""
        if (self._depth or self._inside) and not self._evaluating:
            self.recover()

    @torch.no_grad()
    def take_over(self) -> None:
        """Have W follow weights that were written to, before A is formed anew."""
        changed = [site.name for site in self.sites if site.take_over()]
        if changed:
            user_warnings.warn(
                f"the weights of {some(changed)} were changed outside of their optimiser: the "
                "network stays as it was made, and W becomes A R^-1"
            )

    @torch.no_grad()
    def transform_gradients(self) -> None:
        """Gradients become those of W before the step."""
        with in_own_precision(self.sites):
            for site in self.sites:
                site.transform()

    # The hooks.

    def _before_step(
        self, optimizer: Any, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        given = list(arguments)
        closure = named.get("closure") or (given[1] if len(given) > 1 else None)
        if not callable(closure):
            self._initialising = self._initialises()
            if not self._initialising:
                self._enter()
            return None
        self._evaluations = 0
        if "closure" in named:
            return arguments, {**named, "closure": self._on_A(closure)}
        given[1] = self._on_A(closure)
        return tuple(given), named

    def is_over(self) -> bool:
        """Called after ``step()``: whether the weights have made a step. A is then back as it was.

        Raises RuntimeError if the step has not evaluated its closure.
        """
        self._depth -= 1
        if self._depth > 0:
            return False
        self._depth = 0
        if self._initialising:
            self._initialising = False
            return False
        unused, self._evaluations = self._evaluations == 0, None
        self._leave()
        self._tell_lr()
        # fused optimisers are called by a GradScaler even if the step is to be left out
        self.found_inf = getattr(self._optimizer, "found_inf", None)
        if unused:
            raise RuntimeError(
                f"{type(self._optimizer).__name__}.step(closure) never evaluated its closure: "
                "expected it to, so that the weights step by its gradients; nothing was learnt of R"
            )
        return True

    def _tell_lr(self) -> None:
        groups = self._optimizer.param_groups
        lr_of = {id(p): group.get("lr") for group in groups for p in group["params"]}
        for site in self.sites:
            site.saw_lr(lr_of.get(id(site.weight)))

    def _initialises(self) -> bool:
        """Whether this step only makes the optimiser's state, before one is saved or loaded.

        torch.distributed.checkpoint does so, at lr 0 with gradients of zero. A schedule may begin at
        lr 0 too, but its gradients are a batch's.
        """
        optimizer = self._optimizer
        if optimizer.state or any(group.get("lr") != 0 for group in optimizer.param_groups):
            return False
        weights = (p for group in optimizer.param_groups for p in group["params"])
        return all(w.grad is not None and not w.grad.any() for w in weights if w.requires_grad)

    def _on_A(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, evaluated on A; after it the parameters and gradients are W's.

        An optimiser that moves the weights between two evaluations gets A of where they are.
        """

        @functools.wraps(closure)
        def evaluate() -> Any:
            if self._inside:
                self._leave()
                if self._evaluations:
                    self.form()
            self._evaluating = True
            try:
                result = closure()
            finally:
                self._evaluating = False
            if self._evaluations is not None:
                self._evaluations += 1
            self._enter()
            return result

        return evaluate

    @torch.no_grad()
    def _enter(self) -> None:
        for site in self.sites:
            site.check()
        self.take_over()
        with in_own_precision(self.sites):
            gradients = [site.gradient_to_step() for site in self.sites]
        self._inside = True
        for site, gradient in zip(self.sites, gradients):
            site.enter(gradient)

    def form(self) -> None:
        """A = W R in all parameters."""
        form(self.sites)
        self.formed()

    def formed(self) -> None:
        """A = W R is in all parameters."""
        for site in self.sites:
            site.formed()
        self._inside = False

    def _leave(self) -> None:
        for site in self.sites:
            site.leave()

    # What hooks do not see.

    def _wrap(self, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put a function made around a method of the instance in its place.

        As a bound method, too: schedulers look for what those have.
        """
        optimizer = self._optimizer
        inner = getattr(optimizer, name)
        made = functools.wraps(getattr(inner, "__func__", inner))(around(inner))
        ours = types.MethodType(made, optimizer)
        self._wrapped.append((name, ours, vars(optimizer).get(name)))
        setattr(optimizer, name, ours)

    def _with_recovery(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(optimizer: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return inner(*arguments, **named)
            except BaseException:
                self.recover()
                raise

        return step

    def _with_drop(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(optimizer: Any, *arguments: Any, **named: Any) -> Any:
            for site in self.sites:
                site.forget_transformed()
                recorder = recorder_of(site)
                if recorder is not None:
                    recorder.drop_spent()
            return inner(*arguments, **named)

        return zero_grad

    def _with_telling(
        self, joined: Callable[[dict[str, Any]], None], inner: Callable[..., Any]
    ) -> Callable[..., Any]:
        def add_param_group(optimizer: Any, *arguments: Any, **named: Any) -> Any:
            result = inner(*arguments, **named)
            joined(optimizer.param_groups[-1])
            return result

        return add_param_group
