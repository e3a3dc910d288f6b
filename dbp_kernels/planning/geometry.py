"""Convolution geometry: sizes, phases, shifts and windows. Pure integers, no tensors.

Per axis, tap ``k`` of output position ``p`` reads input coordinate ``stride*p + dilation*k - padding``.
Write ``t = dilation*k - padding``: the tap reads *phase* ``t mod stride`` of the input at lattice
index ``p + shift`` with ``shift = floor(t/stride)``. Two pairs of taps with the same phases and the
same difference of shifts therefore multiply the same pixels, except at the borders, where their
*windows* of lattice indices differ. That is all the structure the second moment needs.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

Window = tuple[int, int]  # lattice indices [start, stop)
# kernel_size, stride, padding, dilation, groups, as the operators take them
OpArguments = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]


@dataclass(frozen=True)
class PairClass:
    """Ordered pairs of taps of one axis that share a product: same phases, same shift difference.

    ``windows`` lists the distinct index windows of the left operand, ``window_of`` maps a pair of
    taps to one of them. ``segments`` cuts the union of the windows into the fewest intervals such
    that every window is a union of whole segments; ``main`` is the longest one.
    """

    phase_left: int
    phase_right: int
    shift: int  # right lattice index = left lattice index + shift
    windows: tuple[Window, ...]
    window_of: dict[tuple[int, int], int]
    segments: tuple[Window, ...]

    @property
    def key(self) -> tuple[int, int, int]:
        """(left phase, right phase, shift)."""
        return self.phase_left, self.phase_right, self.shift

    @property
    def self_inverse(self) -> bool:
        """Whether the class equals its own transpose: the block of shift zero is symmetric."""
        return self.phase_left == self.phase_right and self.shift == 0

    @property
    def canonical(self) -> bool:
        """Of a class and its transpose exactly one is canonical (both when they coincide)."""
        return self.key <= (self.phase_right, self.phase_left, -self.shift)

    @cached_property
    def main(self) -> Window:
        """The longest segment: the interior that (nearly) all windows share."""
        return max(self.segments, key=lambda s: s[1] - s[0])

    def covers(self, window: int, segment: Window) -> bool:
        """Whether the window with this index contains the segment."""
        start, stop = self.windows[window]
        return start <= segment[0] and segment[1] <= stop


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution; sizes in pixels."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @cached_property
    def span(self) -> int:
        """Pixels from the first to the last tap, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @cached_property
    def output(self) -> int:
        """Number of output positions; 0 or less when the kernel does not fit."""
        return (self.size + 2 * self.padding - self.span) // self.stride + 1

    def tap(self, k: int) -> tuple[int, int]:
        """(phase, shift) of tap ``k``."""
        shift, phase = divmod(self.dilation * k - self.padding, self.stride)
        return phase, shift

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """The phases some tap reads, in ascending order."""
        return tuple(sorted({self.tap(k)[0] for k in range(self.kernel)}))

    def lattice(self, phase: int) -> int:
        """Number of input pixels in this phase."""
        return max(0, -((phase - self.size) // self.stride))

    def valid(self, k: int) -> Window:
        """Output positions at which tap ``k`` reads a real pixel rather than padding."""
        phase, shift = self.tap(k)
        start = max(0, -shift)
        return start, max(start, min(self.output, self.lattice(phase) - shift))

    @cached_property
    def pair_classes(self) -> tuple[PairClass, ...]:
        """All non-empty classes of ordered tap pairs."""
        pairs: dict[tuple[int, int, int], dict[tuple[int, int], Window]] = defaultdict(dict)
        for k in range(self.kernel):
            phase_k, shift_k = self.tap(k)
            for j in range(self.kernel):
                phase_j, shift_j = self.tap(j)
                start = max(self.valid(k)[0], self.valid(j)[0]) + shift_k
                stop = min(self.valid(k)[1], self.valid(j)[1]) + shift_k
                if start < stop:
                    pairs[phase_k, phase_j, shift_j - shift_k][k, j] = (start, stop)
        classes = []
        for (left, right, shift), windows_by_pair in sorted(pairs.items()):
            windows = tuple(sorted(set(windows_by_pair.values())))
            window_of = {pair: windows.index(w) for pair, w in windows_by_pair.items()}
            classes.append(PairClass(left, right, shift, windows, window_of, cut(windows)))
        return tuple(classes)

    @cached_property
    def class_of(self) -> dict[tuple[int, int], PairClass]:
        """The class of each ordered tap pair that some position sees."""
        return {pair: c for c in self.pair_classes for pair in c.window_of}


def cut(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The fewest intervals such that every one of ``windows`` is a union of whole intervals."""
    windows = tuple(windows)
    cuts = sorted({edge for window in windows for edge in window})
    return tuple(
        (a, b)
        for a, b in itertools.pairwise(cuts)
        if any(start <= a and b <= stop for start, stop in windows)
    )


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


@lru_cache(maxsize=4096)
def _axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    # Shared, because pair_classes is cached on the instance.
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
        ValueError: naming the argument, its value and what was expected.
        RuntimeError: kernel larger than the padded input, as torch's convolutions raise it.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: expected at least 1")
    dims = len(kernel_size)
    sizes: Sequence[int] = ()
    if dims == 0:
        if len(shape) < 1:
            raise ValueError("input is 0-dimensional: expected (..., D) with kernel_size=[]")
        channels, batch = shape[-1], math.prod(shape[:-1])
    else:
        if dims > 3:
            raise ValueError(f"kernel_size={list(kernel_size)}: expected at most 3 entries")
        if len(shape) != dims + 2:
            raise ValueError(
                f"input has shape {tuple(shape)}: expected {dims + 2} dimensions (N, C, and "
                f"{dims} spatial) for kernel_size={list(kernel_size)}"
            )
        batch, channels, *sizes = shape
        if 0 in sizes:  # RuntimeError as torch's own convolutions
            raise RuntimeError(
                f"input has shape {tuple(shape)}: expected no empty dimension but the batch"
            )
    if channels % groups:
        raise ValueError(
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
            raise ValueError(f"{name}={list(values)}: expected {dims} entries")
        if any(v < least for v in values):
            raise ValueError(f"{name}={list(values)}: expected entries of at least {least}")
        columns.append(values[:dims])
    axes = tuple(_axis(*row) for row in zip(sizes, *columns))
    if any(axis.output < 1 for axis in axes):
        # RuntimeError and wording as torch's own convolutions
        padded = " x ".join(str(axis.size + 2 * axis.padding) for axis in axes)
        spans = " x ".join(str(axis.span) for axis in axes)
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded}). Kernel size: ({spans}), "
            "dilation included. Kernel size can't be greater than actual input size"
        )
    return ConvGeometry(batch, channels, groups, axes)


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """(low, high) padding of ``padding="same"``; an even span pads the extra pixel high."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
