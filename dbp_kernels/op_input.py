"""A layer's samples as the ops take them: in few batches, padded as far as an op cannot, with geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dbp_kernels.functional import resolved
from dbp_kernels.ops import geometry_of
from dbp_kernels.planning.geometry import ConvGeometry

_NO_WINDOW = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


@dataclass(frozen=True)
class OpInput:
    """One input of an op.

    Attributes:
        x: (N, C, *spatial), padded already as far as ``padding_mode`` wants it, or rows (n, D).
        arguments: those of the op that follow it: kernel_size, stride, padding, dilation, groups.
        geometry: of x and these.
    """

    x: Tensor
    arguments: tuple[Any, ...]
    geometry: ConvGeometry


def op_inputs(samples: Sequence[Tensor], window: Mapping[str, Any]) -> list[OpInput]:
    """The samples of a layer in as few inputs as their shapes allow.

    Args:
        samples: images (N, C, *spatial), or (..., D) where the window has no kernel.
        window: how the layer sees its patches: arguments of ``dbp.patch_gram``, of which all but
            kernel_size have its defaults.
    """
    batches = list(samples)
    if not window["kernel_size"]:
        batches = [sample.reshape(-1, sample.shape[-1]) for sample in batches]
    if len(batches) > 1:
        alike: dict[Any, list[Tensor]] = {}
        for batch in batches:
            alike.setdefault((batch.shape[1:], batch.dtype), []).append(batch)
        batches = [torch.cat(batch) for batch in alike.values()]
    items = [_hashable(*item) for item in window.items()]
    return [_op_input(batch, items) for batch in batches]


def _op_input(batch: Tensor, window: list[tuple[str, Any]]) -> OpInput:
    seen = _seen(batch.shape, batch.dtype, *window)
    if any(seen.pad):
        batch = F.pad(batch, seen.pad, mode=seen.pad_mode)
    return OpInput(batch, seen.arguments, seen.geometry)


@dataclass(frozen=True)
class _Seen:
    """How ops see a batch: padded like this, with these arguments after it."""

    pad: tuple[int, ...]
    pad_mode: str
    arguments: tuple[Any, ...]
    geometry: ConvGeometry


@lru_cache(maxsize=1024)
def _seen(shape: torch.Size, dtype: torch.dtype, *window: tuple[str, Any]) -> _Seen:
    """Kept: to work it out anew for every layer takes a good part of a step's time on the host."""
    pad, mode, arguments, _ = resolved(shape, **{**_NO_WINDOW, **dict(window)})
    # nothing but the shape of the padded batch counts
    padded = F.pad(torch.empty(shape, dtype=dtype, device="meta"), pad)
    return _Seen(pad, mode, arguments, geometry_of(padded, *arguments))


def _hashable(name: str, value: Any) -> tuple[str, Any]:
    """A layer's argument, which may have been set by hand to a list."""
    return (name, tuple(value)) if isinstance(value, list) else (name, value)
