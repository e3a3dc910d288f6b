"""Convolution geometry: what an op's arguments mean for an input's shape. Integers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dbp_kernels.planning.axis import Axis

# kernel_size, stride, padding, dilation, groups, as the operators take them
OpArguments = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]


class GeometryError(ValueError, RuntimeError):
    """Sizes that no convolution has. Torch's own convolutions raise RuntimeError for them."""


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a convolution's patches that is an integer.

    ``batch``, ``channels`` and the sizes in ``axes`` describe the input (batch, channels, *spatial).
    With no axes the input is (batch, channels) and its rows already are the patches (Linear).
    """

    batch: int
    channels: int
    groups: int
    axes: tuple[Axis, ...]

    def __hash__(self) -> int:
        return self._hash  # asked for several times in every call

    @cached_property
    def _hash(self) -> int:
        return hash((self.batch, self.channels, self.groups, self.axes))

    @cached_property
    def taps(self) -> int:
        """Taps of the kernel, K*K in two dimensions."""
        return math.prod(a.kernel for a in self.axes)

    @cached_property
    def group_channels(self) -> int:
        """Channels of one group."""
        return self.channels // self.groups

    @cached_property
    def dim(self) -> int:
        """D, the length of one patch."""
        return self.group_channels * self.taps

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return tuple(a.output for a in self.axes)

    @cached_property
    def positions(self) -> int:
        """Patches per image."""
        return math.prod(self.output_size)

    @cached_property
    def samples(self) -> int:
        """n, the number of patches: batch times output positions."""
        return self.batch * self.positions

    @cached_property
    def pointwise(self) -> bool:
        """Whether every patch is one pixel (kernel 1, no padding) or one row (no axes)."""
        return all(a.kernel == 1 and a.padding == 0 for a in self.axes)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(a.kernel for a in self.axes)

    @cached_property
    def strided(self) -> bool:
        """Whether any axis has a stride above 1."""
        return any(a.stride > 1 for a in self.axes)

    @cached_property
    def input_numel(self) -> int:
        """Elements of the input."""
        return self.batch * self.channels * math.prod(a.size for a in self.axes)

    @property
    def patch_numel(self) -> int:
        """Elements of all patches."""
        return self.samples * self.groups * self.dim

    @property
    def expansion(self) -> float:
        """Elements of all patches over those of the input."""
        return self.patch_numel / max(1, self.input_numel)

    def with_batch(self, batch: int) -> ConvGeometry:
        """The same convolution over another number of images."""
        return ConvGeometry(batch, self.channels, self.groups, self.axes)


@lru_cache(maxsize=1024)
def _axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    # Shared, so that what there is to compute is counted once.
    return Axis(size, kernel, stride, padding, dilation)


def make_geometry(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    """Checked geometry of an input of ``shape``, for the opaque ops.

    Args:
        shape: (N, C, *spatial), or (..., D) with ``kernel_size=[]``.
        kernel_size, stride, padding, dilation: one entry per spatial axis, as in aten. A single
            entry of stride, padding or dilation stands for all axes.
        groups: number of channel groups.

    Raises:
        GeometryError: naming the argument, its value and what was expected.
    """
    if groups < 1:
        raise GeometryError(f"groups={groups}: expected at least 1")
    dims = len(kernel_size)
    sizes: Sequence[int] = ()
    if dims == 0:
        if len(shape) < 1:
            raise GeometryError("input is 0-dimensional: expected (..., D) with kernel_size=[]")
        channels, batch = shape[-1], math.prod(shape[:-1])
    else:
        if dims > 3:
            raise GeometryError(f"kernel_size={list(kernel_size)}: expected at most 3 entries")
        if len(shape) != dims + 2:
            raise GeometryError(
                f"input has shape {tuple(shape)}: expected {dims + 2} dimensions (N, C, and "
                f"{dims} spatial) for kernel_size={list(kernel_size)}"
            )
        batch, channels, *sizes = shape
        if 0 in sizes:
            raise GeometryError(
                f"input has shape {tuple(shape)}: expected no empty dimension but the batch"
            )
    if channels % groups:
        raise GeometryError(
            f"groups={groups}: expected a divisor of the {channels} channels of the input"
        )
    columns = []
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        values = tuple(values)
        if len(values) == 1 and dims > 1:
            values *= dims
        if len(values) != dims:
            raise GeometryError(f"{name}={list(values)}: expected {dims} entries")
        if any(v < least for v in values):
            raise GeometryError(f"{name}={list(values)}: expected entries of at least {least}")
        columns.append(values[:dims])
    axes = tuple(_axis(*row) for row in zip(sizes, *columns))
    if any(axis.output < 1 for axis in axes):
        # worded as by torch's own convolutions
        padded = " x ".join(str(axis.size + 2 * axis.padding) for axis in axes)
        spans = " x ".join(str(axis.span) for axis in axes)
        raise GeometryError(
            f"Calculated padded input size per channel: ({padded}). Kernel size: ({spans}), "
            "dilation included. Kernel size can't be greater than actual input size"
        )
    geometry = ConvGeometry(batch, channels, groups, axes)
    _check_size(geometry)
    return geometry


def _check_size(geometry: ConvGeometry) -> None:
    """Raises GeometryError for what torch could not address."""
    sizes = {
        "padded input and stride": max(
            (a.size + 2 * a.padding + a.stride for a in geometry.axes), default=0
        ),
        "dilation": max((a.dilation for a in geometry.axes), default=0),
        "number of all patches' elements": geometry.patch_numel,
        "number of S's bytes": 8 * geometry.groups * geometry.dim**2,
    }
    for name, size in sizes.items():
        if size >= 1 << 63:
            raise GeometryError(f"{name} is {size} for {geometry}: expected less than 2**63")


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """(low, high) padding of ``padding="same"``; an even span pads the extra pixel high."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
