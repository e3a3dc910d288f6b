"""The second moment from weight-gradient convolutions of the input with itself.

The weight gradient of a convolution of kernel 2K-1 with x as input and (a box of) x as output
gradient is the sum over that box of x(q) x(q + dilation*m)^T for every tap difference m, which is
all that S consists of. Tap k of the left operand reads a box of lattice indices (its window); the
windows of different taps share their interior and differ by border strips, so each *segment* of
the windows costs one convolution and every tap adds up the segments it covers.
The libraries' weight gradient is hard to beat on few channels. It computes both halves of a
symmetric result, so on many channels the shifted products win.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import EllipsisType

import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from dbp_kernels.planning.axis import Window, cut
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.layout import WGRAD_POSITIONS
from dbp_kernels.precision import convolutions_as_matmul, statistics_dtype

_WEIGHT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: grad.conv1d_weight,
    2: grad.conv2d_weight,
    3: grad.conv3d_weight,
}


def patch_gram_self_wgrad(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """S (groups, D, D) of x (N, C, *spatial) with at least one spatial axis and one sample."""
    axes, g, cg = geometry.axes, geometry.groups, geometry.group_channels
    x = x.to(statistics_dtype(x.dtype))
    reach = [a.dilation * (a.kernel - 1) for a in axes]  # how far from its partner a tap may read
    padded = F.pad(x, [r for axis_reach in reversed(reach) for r in (axis_reach, axis_reach)])
    weight_size = _weight_size(geometry)
    out = x.new_zeros(g, cg, *geometry.kernel_size, cg, *geometry.kernel_size)
    for phases in itertools.product(*(a.phases for a in axes)):
        windows = [a.own_windows(p) for a, p in zip(axes, phases)]
        segments = [cut(window for _, window in w) for w in windows]
        for box in itertools.product(*segments):
            with convolutions_as_matmul(x):
                blocks = _segment(x, padded, geometry, phases, box)
            blocks = blocks.view(g, cg, *weight_size[1:])
            covering = [
                [k for k, (low, high) in w if low <= start and stop <= high]
                for w, (start, stop) in zip(windows, box)
            ]
            for taps in itertools.product(*covering):
                # tap difference m is at index m + K - 1
                differences = (
                    slice(a.kernel - 1 - k, 2 * a.kernel - 1 - k) for a, k in zip(axes, taps)
                )
                place: tuple[slice | int, ...] = (slice(None), slice(None), *taps)
                shared: tuple[EllipsisType | slice, ...] = (..., *differences)
                out[place] += blocks[shared]
    return out.view(g, geometry.dim, geometry.dim).div_(geometry.samples)


def _weight_size(geometry: ConvGeometry) -> tuple[int, ...]:
    differences = (2 * a.kernel - 1 for a in geometry.axes)
    return geometry.channels, geometry.group_channels, *differences


def _segment(
    x: Tensor,
    padded: Tensor,
    geometry: ConvGeometry,
    phases: tuple[int, ...],
    box: tuple[Window, ...],
) -> Tensor:
    """Sums of x(q) x(q + dilation*m)^T over one box of lattice indices, in short pieces."""
    axes = geometry.axes
    (top, bottom), *inner = box
    columns = math.prod(stop - start for start, stop in inner)
    rows = max(1, WGRAD_POSITIONS // columns)
    images = max(1, WGRAD_POSITIONS // (columns * (bottom - top)))
    total: Tensor | None = None
    for row in range(top, bottom, rows):
        left, right = x, padded
        band = ((row, min(row + rows, bottom)), *inner)
        for d, (a, phase, (start, stop)) in enumerate(zip(axes, phases, band), start=2):
            first, length = a.stride * start + phase, a.stride * (stop - start - 1) + 1
            left = left.narrow(d, first, length)
            right = right.narrow(d, first, length + 2 * a.dilation * (a.kernel - 1))
        strides = (slice(None, None, a.stride) for a in axes)
        every: tuple[EllipsisType | slice, ...] = (..., *strides)
        left = left[every]
        for left_part, right_part in zip(left.split(images), right.split(images)):
            piece = _WEIGHT_GRADIENT[len(axes)](
                right_part,
                _weight_size(geometry),
                left_part,
                stride=[a.stride for a in axes],
                dilation=[a.dilation for a in axes],
                groups=geometry.groups,
            )
            total = piece if total is None else total.add_(piece)
    assert total is not None  # no box is empty
    return total
