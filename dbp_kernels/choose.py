"""Which algorithm, plan or way a call takes: the planner asked on behalf of a backend, for tensors.

The one place where it is. A `Choice` is made here once, by an op that is called or by the step that
learns R, and handed down: backends receive it. ``*_choices`` give all answers, for estimates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbp_kernels import backends
from dbp_kernels.backends.cuda import library
from dbp_kernels.planning import planner
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.precision import statistics_dtype, tf32, update_products

_HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_UNFOLD = Choice("unfold", 0.0, 0.0)


def gram(x: Tensor, geometry: ConvGeometry, backend: str) -> Choice:
    """The algorithm for S of x, by the backend of this name."""
    if geometry.pointwise and backend == "eager":
        return _UNFOLD  # it has no other: not worth a small layer's time
    return gram_choices(geometry, x.device.type, x.dtype, backend)[0]


def update(x: Tensor, geometry: ConvGeometry, backend: str) -> Choice:
    """The plan for an update from samples x, by the backend of this name."""
    return update_choices(geometry, x.device.type, x.dtype, backend)[0]


def reads_rows(geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether an update from such samples will be by a kernel that reads them as rows of channels."""
    if 0 in (geometry.dim, geometry.samples):
        return False
    algorithm = update_choices(geometry, device_type, dtype, backend)[0].gram
    return algorithm is not None and planner.reads_rows(algorithm.name, geometry)


def stats(x: Tensor, geometry: ConvGeometry, backend: str) -> Choice:
    """The way to C and V of x, by the backend of this name, which knows what its kernel holds."""
    for choice in stats_choices(geometry, x.device.type, x.dtype, backend):
        if choice.name != "fused" or backends.module(backend).fuses_stats(x, geometry):
            return choice
    raise AssertionError("the planner always offers a way without a fused kernel")


def gram_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Choice, ...]:
    """The algorithms for S of an input of this dtype, cheapest first; on the selected backend if None."""
    where = _where(device_type, dtype, backend)
    return planner.gram_choices(geometry, *where[:5], *where[6:])


def update_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Choice, ...]:
    """The plans for one update from samples of this dtype, cheapest first."""
    return planner.update_choices(geometry, *_where(device_type, dtype, backend))


def stats_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Choice, ...]:
    """The ways to C and V from samples of this dtype, cheapest first."""
    where = _where(device_type, dtype, backend)
    return planner.stats_choices(geometry, *where[:5], *where[6:])


def _where(device_type: str, dtype: torch.dtype, backend: str | None = None) -> tuple[Any, ...]:
    """The planner's arguments, after the geometry; the sixth is for updates only."""
    itemsize = statistics_dtype(dtype).itemsize
    backend = backend or backends.selected(device_type)
    if dtype == torch.float64 or (backend == "eager" and device_type != "cuda"):
        return device_type, itemsize  # products of float32 or float64
    float32 = "tf32" if tf32() else "ieee"
    sm90 = backend == "cuda" and library.sm90_problem() is None
    # interpreted kernels make the choices of a GPU
    return "cuda", itemsize, backend, _HALF.get(dtype, float32), float32, _products(backend), sm90


def _products(backend: str) -> tuple[str, str]:
    """The precisions of what forms M and of what changes R."""
    both = update_products()
    if both == "tf32x3":
        return both if backend == "triton" else "ieee", "tf32"
    return both, both
