"""One algorithm of a backend with kernels, whatever the planner would choose: "cuda_sm90", "triton_shift".

``python -m bench --suite kernels --methods dbp,cuda_sm90,cuda_shift,triton_shift`` times them in turns.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
from torch import Tensor

from bench.core.registry import Case
from bench.rivals import NotApplicable, Rival


def algorithms(device: torch.device, dtype: torch.dtype) -> dict[str, Rival]:
    """{name: its method} of all algorithms that a backend has kernels for, usable here or not."""
    from dbp_kernels.planning.planner import ALGORITHMS, KERNEL_BACKENDS

    names = [name for name in ALGORITHMS if name.partition("_")[0] in KERNEL_BACKENDS]
    return {name: _method(name, device, dtype) for name in names}


def _method(name: str, device: torch.device, dtype: torch.dtype) -> Rival:
    from dbp_kernels import backends
    from dbp_kernels.backends.prepared import Gram
    from dbp_kernels.planning.choice import Choice

    backend, form = name.split("_")
    choice = Choice(name, 0.0, 0.0)

    def compute(x: Tensor, case: Case) -> Tensor:
        ops = importlib.import_module(f"dbp_kernels.backends.{backend}.ops")
        call = ops._gram(x, geometry_of(case), choice)
        if not isinstance(call, Gram):
            raise NotApplicable(f"no kernel of {name} covers this input: torch would compute it")
        return call(x)

    def why_not(case: Case) -> str:
        if form == "shift" and case.kernel in ((), (1, 1)):
            return f"nothing to shift: see {backend}_direct"
        if form == "sm90" and case.stride != (1, 1):
            return "strided"
        if form == "sm90" and dtype not in (torch.bfloat16, torch.float16):
            return f"not for {dtype}"
        return backends.unusable(backend, device.type) or ""

    return Rival(name, compute, why_not, ours=True)


@lru_cache(maxsize=1024)
def geometry_of(case: Case):
    """The convolution of a case."""
    from dbp_kernels.planning.geometry import make_geometry

    return make_geometry(case.input_shape, *case.window)
