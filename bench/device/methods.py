"""Our kernels by family, each called by its own name rather than by the planner's choice."""

from __future__ import annotations

from functools import cache

import torch

from ..algorithms import algorithms, geometry_of
from ..registry import Case
from ..rivals import Rival


def kernel_method(family: str, device: torch.device, dtype: torch.dtype) -> Rival:
    """S by the kernels of a family: of its forms the one that the planner thinks is faster."""
    known = algorithms(device, dtype)

    @cache
    def algorithm(case: Case) -> Rival:  # kept: what is timed must not be the choice
        return known[_cheapest(family, case, device, dtype)]

    return Rival(
        family,
        lambda x, case: algorithm(case).compute(x, case),
        lambda case: algorithm(case).why_not(case),
        ours=True,
    )


def _cheapest(family: str, case: Case, device: torch.device, dtype: torch.dtype) -> str:
    from dbp_kernels import backends
    from dbp_kernels.choices import gram_choices

    if family == "cuda_sm90":
        return family
    forms = (f"{family}_shift", f"{family}_direct")
    with backends.backend(family):
        offered = gram_choices(geometry_of(case), device.type, dtype)
    return next(choice.name for choice in offered if choice.name in forms)
