"""Correctness before speed: every S against the float64 oracle, on the input that is timed.

The bound scales with the problem: ours may err twice as much as plain torch (unfold + matmul in the
same precision) plus 1e-6; a rival, which is there only to be timed, twenty times as much plus 1e-5.
With half-precision inputs a rival may round S itself to that precision: 1e-2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_cap(x: Tensor) -> float:
    """The most that plain torch may err itself: above it, unfold + matmul counts as wrong too."""
    if x.dtype == torch.float64:
        return 1e-12
    if x.is_cuda and x.dtype.itemsize < 4:
        return 1e-3  # tensor cores truncate sums: 8e5 patches of one sign lose some 2e-4
    if x.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return 5e-3  # tf32
    return 1e-4


def bound(ours: bool, plain_error: float, x: Tensor) -> float:
    """The largest accepted error of our method, or of a rival."""
    plain = min(plain_error, plain_cap(x))
    if x.dtype == torch.float64:
        return 1e-12
    if ours:
        return 2 * plain + 1e-6
    return 1e-2 if x.dtype.itemsize < 4 else 20 * plain + 1e-5
