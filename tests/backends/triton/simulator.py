"""Runs the compiled PTX of every kernel launch on the CPU (in the child process of ``compiled``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dbp_kernels.backends.triton import runtime


@contextmanager
def simulated(target: int = 80, seed: int = 0, race_check: bool = True) -> Iterator[list[str]]:
    """Within it, kernels are compiled for ``target`` and simulated; yields the launched names.

    ``race_check`` understands whole-block barriers and cp.async, not the copies of tensor
    descriptors: kernels that take one are run without it.
    """
    import ptxsim.triton

    launched: list[str] = []

    def launch(kernel, grid, arguments: dict[str, Any], num_warps: int, num_stages: int) -> None:
        launched.append(kernel.fn.__name__)
        constexprs, values, signature = {}, [], {}
        for parameter in kernel.params:
            name = parameter.name
            value = arguments.get(name, parameter.default)
            # the JIT turns the integer 1 into a constant, unless told otherwise
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or one or value is None:
                constexprs[name] = value
                continue
            if parameter.annotation_type:
                signature[name] = parameter.annotation_type
            values.append(_argument(value))
        types = [ptxsim.triton.type_of(value) for value in values]
        ptxsim.triton.run(
            kernel,
            grid,
            values,
            signature,
            constexprs,
            num_warps,
            num_stages,
            target,
            compile_options=runtime.OPTIONS,
            seed=seed + len(launched),
            race_check=race_check and not any(t.startswith("tensordesc") for t in types),
        )

    runtime.simulate(runtime.Simulator(target, launch))
    try:
        yield launched
    finally:
        runtime.simulate(None)


def _argument(value: Any) -> Any:
    """Descriptors and strided tensors in the simulator's form; everything else as it is."""
    if isinstance(value, torch.Tensor) and not value.is_contiguous():
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
        return value.as_strided((reach + 1,), (1,))  # all that kernels may touch
    if not hasattr(value, "block_shape"):
        return value
    import ptxsim.triton

    array = value.base.as_strided(value.shape, value.strides)
    element = runtime.element(array.dtype)
    return ptxsim.triton.Descriptor(array, tuple(value.block_shape), element)
