"""Nothing is left half done: signals wait for its end, and what an error has interrupted is finished."""

from __future__ import annotations

# behind `signal`, whose functions turn all they are given and return into enumerations: to ask those
# for the handlers of all signals takes 20 us, several times a launch
import _signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from signal import valid_signals
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_NUMBERS = tuple(int(number) for number in valid_signals())

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it signals wait for the end of the block, whose Python handlers could raise anywhere.

    That is SIGINT, by which KeyboardInterrupt comes, and whatever else the program has set a handler
    for. At the end the handlers are as they were, and called, once for each signal that came. Signals
    that are ignored, end the process, or have a handler of C code are left alone.

    Handlers run in the main thread only, so in other threads there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {n: h for n in _NUMBERS if callable(h := _signal.getsignal(n))}
    received: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))

    try:
        for number in handlers:
            _signal.signal(number, wait)
        yield
    finally:
        try:
            _restore(list(handlers.items()))
        finally:
            _deliver([(handlers[number], number, frame) for number, frame in received])


def _restore(handlers: list[tuple[int, Handler]]) -> None:
    """All of them, whatever is raised by one that is back already."""
    try:
        while handlers:
            _signal.signal(*handlers[-1])
            handlers.pop()
    finally:
        if handlers:
            _restore(handlers)


def _deliver(received: list[tuple[Handler, int, FrameType | None]]) -> None:
    """To all of the handlers, whatever one of them raises."""
    while received:
        handler, number, frame = received.pop(0)
        try:
            handler(number, frame)
        finally:
            _deliver(received)


def check_writable(tensor: Tensor, what: str, layer: str) -> None:
    """Raises RuntimeError for a tensor that torch refuses to write to, or may have by then."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        why = "was made in inference mode"
    elif tensor.is_contiguous() or 0 not in tensor.stride():
        return
    elif any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape)):
        why = f"is expanded to {tuple(tensor.shape)}, so that entries share memory"
    else:
        return
    raise RuntimeError(
        f"{what} of layer {layer!r} cannot be written to in place: it {why}; expected its clone()"
    )


def version(tensor: Tensor) -> int:
    """It counts the writes to a tensor, but for those to one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def carry_through(*writes: Callable[[], object]) -> None:
    """Make all of the writes, in order; where one raises, make it again, and the others; then raise.

    Each can be made again, whether it had its effect when it raised or not. One that raises again
    ends this at once, and leaves what has been written.
    """
    errors: list[BaseException] = []
    for write in writes:
        try:
            write()
        except BaseException as error:
            errors.append(error)
            write()
    if errors:
        raise errors[0]


class Once:
    """A call that changes tensors in place, once however often this is called.

    The very same call of torch changes a mark; where one has raised, the mark tells whether it had
    its effect.

    Args:
        change: torch._foreach_add_, torch._foreach_addcmul_ or torch._foreach_mul_.
        tensors: what it changes, of one dtype and device.
        operands: lists of what it adds or multiplies by.
        scale: a number by which that is multiplied, by name.
    """

    def __init__(
        self,
        change: Callable[..., Any],
        tensors: list[Tensor],
        *operands: list[Tensor],
        **scale: float,
    ) -> None:
        zero, one = tensors[0].new_zeros(()), tensors[0].new_ones(())
        self._before = change is torch._foreach_mul_
        self._mark, by = (one, zero) if self._before else (zero, one)
        others = ([*own, by] for own in operands)
        self._change = partial(change, [*tensors, self._mark], *others, **scale)
        self._tried = False

    def __call__(self) -> None:
        if not self._tried or bool(self._mark) == self._before:
            self._tried = True
            self._change()
