"""The phases of a decorrelated step, as ranges in the records of torch's profiler.

Without a profiler a mark costs two questions. Nothing is marked in what torch.compile, torch.export or
torch.jit.trace look at: a range would become part of their graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
STEP = "DecorUpdate.step()"

P = ParamSpec("P")
T = TypeVar("T")


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Has a function's calls show as ranges "dbp: <name>" wherever a profiler is active."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def marked(*arguments: P.args, **named: P.kwargs) -> T:
            # first of all, so that compiled code need not ask for a profiler
            if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
                return function(*arguments, **named)
            if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
                return function(*arguments, **named)
            with record_function(PREFIX + name):
                return function(*arguments, **named)

        return marked

    return mark
