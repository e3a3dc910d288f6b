"""The product that rivals are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 (float64) result: by out_dtype on CUDA, by upcasting on the CPU.

    Takes matrices, or batches of them.
    """
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
