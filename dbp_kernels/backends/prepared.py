"""What a call of kernels needs beside memory, worked out once for all inputs that look alike.

Geometry, plan, tables on the device and the arguments of launches depend on an input's layout and not
on what it holds. A function under ``@prepared`` works them out, and what it returns is kept: calling
that only allocates and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from dbp_kernels.backends.rows import aligned, has_room
from dbp_kernels.planning.kept import Store
from dbp_kernels.precision import update_products

# Bytes of all functions together. One holds 10 KB of tables on the device for a layer of a ResNet on
# average, 100 KB at most, and shares them with other layouts of its geometry.
_MOST = 64 << 20

_kept: Store[Any] = Store(_MOST)
_captured: set[Any] = set()
T = TypeVar("T")


def prepared(make: Callable[..., T]) -> Callable[..., T]:
    """Calls ``make(x, *arguments)`` once per layout of x and arguments, and keeps what it returns.

    A layout is shape, strides, dtype, device, alignment and whether rows have room at the end (see
    ``rows.py``); the precision of products counts as well.
    ``make`` may look at nothing else of x, and must not keep it; x's device is the current one.
    """

    @wraps(make)
    def kept(x: Tensor, *arguments: Hashable) -> T:
        layout = x.shape, x.stride(), x.dtype, x.device, aligned(x), has_room(x)
        key = (make, *layout, update_products(), *arguments)
        found = _kept.get(key)
        if found is None:
            with torch.cuda.device_of(x):
                found = (make(x, *arguments),)
            _kept.keep(key, found[0])
        # the replays of a CUDA graph read the same tables: they must never be freed
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.add(found[0])
        return found[0]

    return kept


def forget() -> None:
    """Works everything out anew: what stands in for the GPU has changed."""
    _kept.clear()


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Gram:
    """The launches that compute a second moment: of partial tiles into a workspace, then their sum.

    Attributes:
        steps: from x to what the products read, one after the other.
        products: launches, called with x and workspace.
        workspace: its float32 elements.
        reduce: a launch, called with workspace and out.
        shape: of the result, (groups, D, D).
    """

    steps: tuple[Callable[[Tensor], Tensor], ...]
    products: tuple[Callable[..., None], ...]
    workspace: int
    reduce: Callable[..., None]
    shape: tuple[int, int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """S (groups, D, D) in float32."""
        for step in self.steps:
            x = step(x)
        workspace = torch.empty(self.workspace, dtype=torch.float32, device=x.device)
        for product in self.products:
            product(x=x, workspace=workspace)
        out = torch.empty(self.shape, dtype=torch.float32, device=x.device)
        self.reduce(workspace=workspace, out=out)
        return out
