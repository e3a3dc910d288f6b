"""The planner asked on behalf of a backend, else the selected one, for tensors of a dtype."""

from __future__ import annotations

import torch

from . import backends, planner
from .backends.cuda import library
from .geometry import ConvGeometry
from .precision import statistics_dtype, tf32

_HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def gram_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[planner.Choice, ...]:
    """The algorithms for S of an input of this dtype, cheapest first."""
    where = _where(device_type, dtype, backend)  # all but the precision of other products
    return planner.gram_choices(geometry, *where[:4], *where[5:])


def update_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[planner.Choice, ...]:
    """The plans for one update from samples of this dtype, cheapest first."""
    return planner.update_choices(geometry, *_where(device_type, dtype, backend))


def stats_choices(
    geometry: ConvGeometry, device_type: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[planner.Choice, ...]:
    """The ways to C and V from samples of this dtype, cheapest first."""
    return planner.stats_choices(geometry, *_where(device_type, dtype, backend))


def _where(device_type: str, dtype: torch.dtype, backend: str | None) -> tuple:
    """The planner's arguments, after the geometry."""
    itemsize = statistics_dtype(dtype).itemsize
    backend = backend or backends.selected(device_type)
    if backend == "eager" or dtype == torch.float64:
        return device_type, itemsize
    float32 = "tf32" if tf32() else "ieee"
    sm90 = backend == "cuda" and library.sm90_problem() is None
    # interpreted kernels make the choices of a GPU
    return "cuda", itemsize, backend, _HALF.get(dtype, float32), float32, sm90
