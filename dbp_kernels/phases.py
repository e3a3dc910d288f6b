"""The phases of a decorrelated step, as ranges in the records of torch's profiler.

Without a profiler a mark costs two questions. Nothing is marked in what torch.compile, torch.export or
torch.jit.trace look at: a range would become part of their graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch.profiler import record_function

PREFIX = "dbp: "
COPY = "forward copy of the samples"
CONDENSE = "A = W R"
BACKWARD = "its backward"
MOMENTS = "second moments S"
PATCHES = "patches of few samples"  # plans that work on Z itself
PRODUCTS = "update products"
WRITE = "write-back of R"
REPLAY = "the update by a CUDA graph, whole"  # no phases are told apart in a replay

P = ParamSpec("P")
T = TypeVar("T")


_NOTHING: AbstractContextManager[None] = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A range "dbp: <name>" wherever a profiler is active."""
    # first of all, so that compiled code need not ask for a profiler
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return _NOTHING
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return _NOTHING
    return record_function(PREFIX + name)


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Has each of a function's calls be a ``span``."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def marked(*arguments: P.args, **named: P.kwargs) -> T:
            with span(name):
                return function(*arguments, **named)

        return marked

    return mark
