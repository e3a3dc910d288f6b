"""One process or several (torchrun), without the callers having to know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def of_first(value: Any) -> Any:
    """What the first process gives; any object that can be pickled."""
    held = [value]
    if active():
        dist.broadcast_object_list(held)
    return held[0]


def of_all(value: Any) -> list[Any]:
    """What every process gives, in their order."""
    if not active():
        return [value]
    held = [None] * world()
    dist.all_gather_object(held, value)
    return held


def mean(values: torch.Tensor) -> torch.Tensor:
    """Over the processes, in which they are of the same shape."""
    if not active():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the others if torchrun has started this process; gives the device that is its own.

    A GPU with a number becomes the current one.
    """
    joins = "WORLD_SIZE" in os.environ and not active()
    if joins and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if joins:
            dist.destroy_process_group()
