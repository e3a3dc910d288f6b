"""Peak extra memory of one call: the most bytes alive at once, beyond its result."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two log lines for every profile


def extra_bytes(call: Callable[[], Tensor], device: torch.device | str = "cpu") -> int:
    """Peak bytes that ``call`` holds beyond what lived before it and beyond the result it returns.

    CUDA: the allocator's own peak. CPU: every allocation and release of torch's allocator, as the
    profiler records them (memory that a BLAS library keeps for itself is not seen).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            result = call()
        peak = _peak_live(prof)
    return max(0, peak - result.numel() * result.element_size())


def _peak_live(prof: profile) -> int:
    """The highest running sum of the recorded allocations (positive) and releases (negative)."""
    changes = sorted(_allocations(prof.profiler.kineto_results.experimental_event_tree()))
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak


def _allocations(events: list) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation event of the profiler's tree."""
    pending = list(events)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
