"""Points in a device's time: the host's clock on a CPU, events on CUDA, which nothing waits for."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any  # seconds, or a CUDA event
host = time.perf_counter  # a benchmark beside other processes puts time.process_time here


def mark(device: torch.device) -> Mark:
    """Now, on the device's current stream."""
    if device.type != "cuda":
        return host()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def wait(point: Mark) -> None:
    """Return once the device has reached the mark."""
    if not isinstance(point, float):
        point.synchronize()


def seconds(begin: Mark, end: Mark) -> float:
    """From one mark of a device to a later one; waits for that."""
    if isinstance(begin, float):
        elapsed: float = end - begin
    else:
        end.synchronize()
        elapsed = begin.elapsed_time(end) * 1e-3
    return elapsed
