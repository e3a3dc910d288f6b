"""What is loaded, checked before anything changes: plain values, and an R."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dbp_kernels.precision import INPUT_DTYPES

# The longest that a row of an R may be. A row r gives inputs of variance 1 a variance of |r|^2, and
# the loss has the square of that: from |r| = 2^32 on it is beyond float32, whose largest number is
# just below 2^128, so that no update of the layer would ever be finite again. An R in float64 is no
# better: its row would bring a variance of 2^-64 to 1, of which rounding beside a variance of 1
# leaves nothing. Steps with a clip hold rows at 2^12; those without one may pass that.
MAX_NORM = 2.0**32
_LARGEST = sys.float_info.max


class StateError(ValueError, RuntimeError):
    """A state is refused: a ValueError, as of any argument, and torch's load_state_dict's own type."""


def is_int(value: Any, low: int = 0, high: int = 2**63 - 1) -> bool:
    """Whether it is an int, and no bool, from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


def is_number(value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> bool:
    """Whether it is a finite int or float, and no bool, from ``low`` to ``high``."""
    return type(value) in (int, float) and low <= value <= high


def why_no_tensor(x: Any, shape: Sequence[int]) -> str | None:
    """Why ``x`` cannot be loaded into a floating-point tensor of a shape, in words; None if it can."""
    if not isinstance(x, Tensor):
        return f"is a {type(x).__name__}: expected a Tensor"
    if x.is_nested or x.layout != torch.strided:
        return f"has the layout {x.layout}{', nested' * x.is_nested}: expected torch.strided"
    if tuple(x.shape) != tuple(shape):
        return f"of shape {tuple(x.shape)}: expected {tuple(shape)}"
    if x.dtype not in INPUT_DTYPES:
        return f"has dtype {x.dtype}: expected a floating-point dtype of 16 to 64 bits"
    return None


def why_no_R(x: Any, shape: Sequence[int]) -> str | None:
    """Why ``x`` cannot be loaded as an R of a shape, in words; None if it can.

    Its entries must be finite, no row longer than ``MAX_NORM``, and none zero: steps leave R
    invertible, and could not make it so again. Looking at them waits for the device.
    """
    reason = why_no_tensor(x, shape)
    if reason is not None or x.is_meta or isinstance(x, FakeTensor) or x.numel() == 0:
        return reason
    with torch.no_grad():
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
        shortest, longest = (float(norm) for norm in rows.aminmax())
        if 0 < shortest <= longest <= MAX_NORM:
            return None
        if not x.isfinite().all():
            return "has entries that are not finite (NaN or Inf)"
    if shortest == 0:
        return "has a row of zeros: expected an invertible matrix"
    largest = float(x.detach().abs().max())
    return f"has entries up to {largest:.3g}: expected rows of a norm of at most {MAX_NORM:.3g}"
