"""Peak memory of a call: the most bytes alive at once beyond what lived before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two log lines for every profile


def extra_bytes(call: Callable[[], Tensor], device: torch.device | str = "cpu") -> int:
    """Peak bytes that ``call`` holds beyond what lived before it and beyond the result it returns."""
    results: list[Tensor] = []
    peak, _ = peak_and_live(lambda: results.append(call()), device)
    return max(0, peak - results[0].numel() * results[0].element_size())


def peak_and_live(
    call: Callable[[], object], device: torch.device | str = "cpu"
) -> tuple[int, int]:
    """(most bytes alive at once, bytes alive afterwards) beyond what lived before ``call``.

    CUDA: the allocator's own figures. CPU: every allocation and release of torch's allocator, as
    the profiler records them (memory that a BLAS library keeps for itself is not seen).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        return torch.cuda.max_memory_allocated(device) - before, live
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    live = peak = 0
    events = prof.profiler.kineto_results.experimental_event_tree()
    for _, size in sorted(_allocations(events)):  # releases are negative
        live += size
        peak = max(peak, live)
    return peak, live


def _allocations(events: list) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation event of the profiler's tree."""
    pending = list(events)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
