"""Suite "scaling": the cost of patch_gram as one size of a layer grows, and the planner's prediction.

Four sweeps through one base layer: over the batch, the image (both make n grow), the channels and
the kernel (both make D grow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.kernels import OURS, PLAIN, Settings, default_methods, run_case
from bench.registry import Case, conv

# N images of C channels, side x side, and a kernel K x K of stride 1
BASE = {
    "cpu": {"batch": 8, "image": 28, "channels": 32, "kernel": 3},
    "cuda": {"batch": 32, "image": 56, "channels": 64, "kernel": 3},
}
SWEEPS = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "image": (7, 14, 28, 56, 112),
    "channels": (4, 8, 16, 32, 64, 128, 256),
    "kernel": (1, 3, 5, 7, 9, 11),
}
PAIRS = 7


def sweep_cases(device_type: str) -> Iterator[tuple[str, int, Case]]:
    """(what grows, its value, the layer); the base layer is part of every sweep."""
    base = BASE[device_type]
    for what, values in SWEEPS.items():
        for value in values:
            size = {**base, what: value}
            layer = conv(size["batch"], size["channels"], size["image"], size["kernel"])
            yield what, value, layer


def run_scaling_case(
    what: str,
    value: int,
    case: Case,
    settings: Settings,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """The record of the kernels suite, ours and unfold + matmul, with the sweep and its value."""
    methods = default_methods(torch.device(settings.device))
    record = run_case(case, settings, {name: methods[name] for name in (OURS, PLAIN)}, tick)
    return {"sweep": what, "value": value, **record}
