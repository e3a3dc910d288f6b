"""Whether a call is plain eager: what aten does beside computing may then be left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def plain(*tensors: Tensor) -> bool:
    """Whether nobody looks at a call on these tensors but, perhaps, reverse-mode autograd.

    Not tracers, forward-mode or functorch's transforms, subclasses, nor function and dispatch modes.
    """
    return (
        not torch.compiler.is_compiling()
        and all(map(nothing_between, tensors))
        and forward_ad._current_level < 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def nothing_between(x: Tensor) -> bool:
    """Whether dispatching ``x`` further would go straight to the kernel: small layers notice."""
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
    )
