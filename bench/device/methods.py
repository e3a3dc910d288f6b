"""Our kernels by family, each called by its own name rather than by the planner's choice."""

from __future__ import annotations

from torch import Tensor

from ..registry import Case
from ..rivals import NotApplicable, Rival

FAMILIES = ("triton", "cuda", "cuda_sm90")


def kernel_method(family: str) -> Rival:
    """S by the kernels of a family: of its forms the one that the planner thinks is faster."""
    return Rival(family, lambda x, case: _patch_gram(family, x, case), lambda case: "", ours=True)


def _patch_gram(family: str, x: Tensor, case: Case) -> Tensor:
    from dbp_kernels import backends
    from dbp_kernels.choices import gram_choices
    from dbp_kernels.geometry import make_geometry
    from dbp_kernels.planner import Choice

    lists = (case.kernel, case.stride, case.padding, case.dilation)
    window = (*(() if case.is_linear else v for v in lists), case.groups)
    geometry = make_geometry(case.input_shape, *window)
    if family == "cuda_sm90":
        from dbp_kernels.backends.cuda.gram import sm90_problem

        problem = sm90_problem(x, geometry)
        if problem:
            raise NotApplicable(problem)
        choice = Choice(family, 0.0, 0.0)
    backend = family.removesuffix("_sm90")
    with backends.backend(backend):
        if backend == family:
            forms = (f"{family}_shift", f"{family}_direct")
            offered = gram_choices(geometry, x.device.type, x.dtype)
            choice = next(c for c in offered if c.name in forms)
        return backends.select(x.device.type).patch_gram(x, geometry, choice)
