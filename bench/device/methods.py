"""Our kernels by family, each called by its own name rather than by the planner's choice."""

from __future__ import annotations

from functools import lru_cache

import torch

from bench.core.registry import Case
from bench.rivals import Rival
from bench.rivals.algorithms import algorithms, geometry_of


def kernel_method(family: str, device: torch.device, dtype: torch.dtype) -> Rival:
    """S by the kernels of a family: of its forms the one that the planner thinks is faster."""
    methods = algorithms(device, dtype)

    @lru_cache
    def method(case: Case) -> Rival:
        from dbp_kernels import backends
        from dbp_kernels.choose import gram_choices

        if family in methods:  # a form by itself, "cuda_sm90"
            return methods[family]
        with backends.backend(family):
            offered = gram_choices(geometry_of(case), device.type, dtype)
        forms = (f"{family}_shift", f"{family}_direct")
        return methods[next(c.name for c in offered if c.name in forms)]

    return Rival(
        family,
        lambda x, case: method(case).compute(x, case),
        lambda case: method(case).why_not(case),
        ours=True,
    )
