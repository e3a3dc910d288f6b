"""Our kernels by family, each called by its own name rather than by the planner's choice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..registry import Case
from ..rivals import NotApplicable, Rival


def kernel_method(family: str) -> Rival:
    """S by the kernels of a family: of its forms the one that the planner thinks is faster."""
    prepared: dict[Case, Callable[[Tensor], Tensor]] = {}

    def compute(x: Tensor, case: Case) -> Tensor:
        if case not in prepared:  # what is timed must not be the choice
            prepared[case] = _prepare(family, x, case)
        return prepared[case](x)

    return Rival(family, compute, lambda case: "", ours=True)


def _prepare(family: str, x: Tensor, case: Case) -> Callable[[Tensor], Tensor]:
    from dbp_kernels import backends
    from dbp_kernels.choices import gram_choices
    from dbp_kernels.geometry import make_geometry
    from dbp_kernels.planner import Choice

    lists = (case.kernel, case.stride, case.padding, case.dilation)
    window = (*(() if case.is_linear else v for v in lists), case.groups)
    geometry = make_geometry(case.input_shape, *window)
    with backends.backend(family.removesuffix("_sm90")):
        module = backends.select(x.device.type)
        if family == "cuda_sm90":
            choice = Choice(family, 0.0, 0.0)
        else:
            forms = (f"{family}_shift", f"{family}_direct")
            offered = gram_choices(geometry, x.device.type, x.dtype)
            choice = next(c for c in offered if c.name in forms)
    if family == "cuda_sm90":
        from dbp_kernels.backends.cuda.gram import sm90_problem

        problem = sm90_problem(x, geometry)
        if problem:
            raise NotApplicable(problem)
    return lambda x: module.patch_gram(x, geometry, choice)
