"""torch's precision of float32 products as threads need it, though it is the whole process's.

Torch has no such argument of a call: what one thread sets, all see. Threads whose needs agree compute
together, others one after the other, and each setting is left as it was found, or as others have set it
meanwhile. Products that are not ours, in other threads, meanwhile have the precision that is set here.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

_mkldnn: Any = torch.backends.mkldnn  # their operations are found at run time only
_cudnn: Any = torch.backends.cudnn

FULL = "full"  # float32's own precision: what is set stays, unless it is lower
AS_FOUND = "as found"

# Where products that have no precision of their own take it from.
_PARENTS = {
    torch.backends.cuda.matmul: _cudnn,  # that is, all of CUDA
    _mkldnn.matmul: _mkldnn,
}


class Within:
    """Within it operations, as ``torch.backends`` names them, have these precisions, or FULL.

    Within another one of the same thread it adds to what that asks for, until it ends.

    Args:
        precisions: by operation.
        by_default: what ``by_default()`` says within it; None: what it says around.
    """

    def __init__(self, precisions: Mapping[Any, str], by_default: bool | None = None) -> None:
        self.precisions = dict(precisions)
        self.needs: dict[Any, str] = {}  # the same, with what FULL comes to
        self.by_default = by_default
        self._outer: Within | None = None

    def __enter__(self) -> None:
        self._outer = outer = _current()
        if outer is not None:
            self.precisions = {**outer.precisions, **self.precisions}
        if self.by_default is None:
            self.by_default = outer is not None and outer.by_default
        try:
            _become(self)
        except BaseException:  # Ctrl-C, while waiting
            _become(outer)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            _become(self._outer)
        except BaseException:
            _become(self._outer)
            raise


def by_default() -> bool:
    """Whether this thread is within an update that nobody has named a precision for."""
    block = _current()
    return block is not None and bool(block.by_default)


# The innermost block of each thread, but of those that wait: these need nothing, so that no two can
# wait for each other. Weakly: one that an interrupt has kept from ending is over with its frame.
_within: dict[int, weakref.ref[Within]] = {}
# Of operations that have been set here: as they were found, and all that they were set to since.
_changed: dict[Any, tuple[str, set[str]]] = {}
# ``with`` takes it by a single call of C, which no interrupt can come between, as it can a Condition.
_lock = threading.RLock()
_turn = threading.Condition(_lock)


def _current() -> Within | None:
    reference = _within.get(threading.get_ident())
    return None if reference is None else reference()


def _become(block: Within | None) -> None:
    """Have this be the thread's innermost block, once no other thread needs anything else."""
    thread = threading.get_ident()
    with _lock:
        _within.pop(thread, None)
        if block is not None:
            block.needs = {op: _needed(op, to) for op, to in block.precisions.items()}
            if _within and not _fits(block):
                _settle()
                _turn.wait_for(lambda: _fits(block))
            _within[thread] = weakref.ref(block, _lost)
        _settle()


def _lost(_: weakref.ref[Within]) -> None:
    """A block that an interrupt has kept from ending is gone: what it needed, nobody needs."""
    with _lock:
        _settle()


def _fits(block: Within) -> bool:
    """Whether no thread is within a block that needs anything else."""
    return all(
        other.needs.get(operation, precision) == precision
        for other in _others()
        for operation, precision in block.needs.items()
    )


def _others() -> list[Within]:
    """The blocks that threads are within."""
    return [block for reference in _within.values() if (block := reference()) is not None]


def _settle() -> None:
    """Set every operation as the blocks need it, and else as it was found; wake those that wait."""
    needed = {op: to for block in _others() for op, to in block.needs.items() if to != AS_FOUND}
    for operation in [op for op in _changed if op not in needed]:
        operation.fp32_precision = _found(operation)
        _changed.pop(operation, None)  # the garbage collector may bring us here from within
    for operation, precision in needed.items():
        if operation.fp32_precision == precision:
            continue
        found = _found(operation)
        ours = _changed[operation][1] if operation in _changed else set()
        _changed[operation] = found, {*ours, precision}  # first: an interrupt may come between
        operation.fp32_precision = precision
    _turn.notify_all()


def _needed(operation: Any, precision: str) -> str:
    if precision != FULL:
        return precision
    found = operation.fp32_precision
    if operation in _changed:  # it is not as it was found, nor as its parent is
        found = _found(operation)
        if found == "none" and operation in _PARENTS:
            found = _PARENTS[operation].fp32_precision
    return AS_FOUND if found in ("ieee", "none") else "ieee"


def _found(operation: Any) -> str:
    """What others have set an operation to; "none" where it is to follow its parent."""
    now = operation.fp32_precision
    if operation in _changed and now in _changed[operation][1]:
        return _changed[operation][0]
    parent = _PARENTS.get(operation)
    inherited = parent is not None and parent.fp32_precision == now
    return "none" if inherited else now


def _forked() -> None:
    """In a child process the other threads are gone, and what they were within is over."""
    global _lock, _turn
    _lock = threading.RLock()
    _turn = threading.Condition(_lock)
    with _lock:
        for thread in _within.keys() - {threading.get_ident()}:
            del _within[thread]
        _settle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_forked,
    )
