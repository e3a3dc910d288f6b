"""How the eager backend computes a second moment, as integers: what it multiplies, cut how, in which buffers.

The planner needs the same numbers for its costs. "Shift" is explained in ``backends/eager/shift.py``.
"""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache

from dbp_kernels.planning.axis import Axis, PairClass, Window
from dbp_kernels.planning.boxes import canonical, row_major, self_inverse, tap_pairs
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.kept import kept

# X^T X is computed in column panels, upper triangle only, where its side is worth cutting (p panels
# need (p + 1) / 2p of the full product's operations) and its rows outweigh mirroring the result. Many
# rows are worth narrower panels, which run at a somewhat lower rate.
PANEL, _NARROW_PANEL, _MAX_PANELS, _FEW_ROWS = 192, 128, 8, 256
# On CUDA calls count: an H100's host needs some 50 us for a product, in which the GPU is done with one
# of three sides of 1024 (float32).
_CUDA_PANEL = 1024
# Fewer multiply-adds are not worth oneDNN's calls, which take 0.1 ms with cold caches.
ONEDNN_WORTH = 1 << 23
# Elements of a buffer. Larger ones are new memory at every call (of C libraries, glibc's from 32 MiB
# on), and an element of them costs up to three times as much.
_AT_ONCE = 1 << 22
_SMALL = 1 << 20  # elements that are not worth a second part
# Libraries add up a weight gradient's long sums one after the other, and lose digits: so many
# positions at a time keep float32 within twice the error of a plain matrix product.
WGRAD_POSITIONS = 2048
# Copying an element costs about as much as this many operations, on CPUs and GPUs alike.
_OPERATIONS_PER_COPY = 130


# --------------------------------------------------------------------------- cutting


def panels(dim: int, rows: int, cuda: bool = False) -> int:
    """Number of column panels to cut X^T X into, for X of ``rows`` rows and ``dim`` columns."""
    if rows < _FEW_ROWS:
        return 1
    panel = _CUDA_PANEL if cuda else _NARROW_PANEL if rows >= 2 * dim else PANEL
    return max(1, min(_MAX_PANELS, dim // panel))


def images_per_chunk(
    geometry: ConvGeometry, expansion: float, inputs: float, device_type: str
) -> int:
    """Images to handle at a time where a buffer has ``expansion`` times their elements.

    It gets at most ``inputs`` times the elements of the whole input, or ``_SMALL`` if that is more,
    and on a CPU at most ``_AT_ONCE``; the parts are of about equal size.
    """
    most = max(inputs * geometry.input_numel, _SMALL)
    if device_type != "cuda":
        most = min(most, _AT_ONCE)
    if geometry.batch == 0:
        return 0
    image = expansion * geometry.input_numel / geometry.batch
    size = geometry.batch if image == 0 else max(1, min(geometry.batch, int(most / image)))
    return math.ceil(geometry.batch / math.ceil(geometry.batch / size))


def wgrad_convolutions(geometry: ConvGeometry) -> int:
    """How many weight-gradient convolutions ``self_wgrad`` runs: one for each segment of each phase."""
    return math.prod(axis.counts.self_segments for axis in geometry.axes)


# --------------------------------------------------------------------------- the shift form


@dataclass(frozen=True)
class Product:
    """One GEMM: row segment x inner box of a class combination, added to some of its blocks.

    The combination has a block for each combination of its classes' windows, ``windows`` many by
    axis, the first of them ``block``; those that get the product have windows in ``covering``.
    """

    row: PairClass
    segment: Window
    block: int
    windows: tuple[int, ...]
    covering: tuple[Window, ...]


@dataclass(frozen=True)
class Band:
    """Products that share their operands' inner segments."""

    inner: tuple[PairClass, ...]
    segments: tuple[Window, ...]
    main: bool
    products: tuple[Product, ...]


@dataclass(frozen=True, eq=False)  # one object per geometry
class ShiftProgram:
    """All products of a shift form, and where their blocks belong.

    S is made of ``blocks`` distinct blocks, of which the first ``symmetric`` ones equal their own
    transposes, then of the transposes of the others, in the same order, then of a block of zeros, for
    taps that no position sees both of. ``source_of`` (int32) has the number of one of these for each
    pair of the shifted axes' taps, in row-major order.
    """

    bands: tuple[Band, ...]
    blocks: int
    symmetric: int
    source_of: array[int]

    @property
    def sources(self) -> int:
        """How many of these there are."""
        return 2 * self.blocks - self.symmetric + 1


def _covering(c: PairClass) -> dict[Window, Window]:
    """The class's segments, the longest one first, each with the range of windows that contain it."""
    windows, segments = c.windows, c.segments
    starts, stops = [start for start, _ in windows], [stop for _, stop in windows]
    # the interior that (nearly) all windows share
    main = max(segments, key=lambda segment: segment[1] - segment[0])
    return {
        (a, b): (bisect_left(stops, b), bisect_right(starts, a))
        for a, b in sorted(segments, key=lambda segment: segment != main)
    }


@kept(mebibytes=16)
def make_program(axes: tuple[Axis, ...]) -> ShiftProgram:
    """The program for the shifted axes, the row axis first. Integers only."""
    row_axis, *inner_axes = axes
    rows = row_axis.pair_classes
    # shifts d and -d in turn: they share the columns that are copied out
    inners = [sorted(a.pair_classes, key=lambda c: abs(c.shift)) for a in inner_axes]
    covering = {c: _covering(c) for classes in (rows, *inners) for c in classes}
    combinations = [each for each in itertools.product(*inners, rows) if canonical(each)]
    combinations.sort(key=lambda classes: not self_inverse(classes))
    first_block: dict[tuple[PairClass, ...], int] = {}
    blocks = symmetric = 0
    for classes in combinations:
        first_block[classes] = blocks
        blocks += math.prod(c.window_count for c in classes)
        if self_inverse(classes):
            symmetric = blocks

    bands = []
    for inner in itertools.product(*inners):
        row_blocks = [(row, first_block.get((*inner, row))) for row in rows]
        if all(block is None for _, block in row_blocks):
            continue
        counts = tuple(c.window_count for c in inner)
        mains = tuple(next(iter(covering[c])) for c in inner)
        for segments in itertools.product(*(covering[c] for c in inner)):
            covered = tuple(covering[c][segment] for c, segment in zip(inner, segments))
            products = tuple(
                Product(row, segment, block, (*counts, row.window_count), (*covered, windows))
                for row, block in row_blocks
                if block is not None
                for segment, windows in covering[row].items()
            )
            bands.append(Band(inner, segments, segments == mains, products))

    kernel = tuple(axis.kernel for axis in axes)
    taps, (row_stride, *strides) = math.prod(kernel), row_major(kernel)
    nothing = 2 * blocks - symmetric
    source_of = array("i", [nothing]) * taps**2
    for classes, block in first_block.items():
        for left, right, place in tap_pairs(classes, (*strides, row_stride)):
            source_of[left * taps + right] = block + place
            if block >= symmetric:
                source_of[right * taps + left] = blocks - symmetric + block + place
    return ShiftProgram(tuple(bands), blocks, symmetric, source_of)


def _columns(axis: Axis) -> int:
    """Lattice columns that hold every phase of an axis."""
    return max(axis.lattice(p) for p in axis.phases)


@dataclass(frozen=True)
class ShiftLayout:
    """How the products of a geometry are laid out, and what that costs; integers and floats only.

    Attributes:
        shifted: the shifted axes, the row axis first.
        side: rows and columns of one block: channels of a group times the unfolded axes' taps.
        zero_columns: whether the buffer has them; without, columns are copied out ``copies`` times.
        widths: columns of each inner axis of the buffer.
        expansion: elements of the buffer over elements of the input.
        rows: inner dimension of one product over the whole batch, zero columns included.
        copies: how often the whole buffer is copied again.
    """

    shifted: tuple[Axis, ...]
    side: int
    zero_columns: bool
    widths: tuple[int, ...]
    expansion: float
    rows: float
    copies: int


@lru_cache(maxsize=1024)
def shift_layout(geometry: ConvGeometry, unfolded: tuple[bool, ...]) -> ShiftLayout:
    """The layout for a geometry with the given axes unfolded, at least one of them not."""
    shifted = tuple(a for a, u in zip(geometry.axes, unfolded) if not u)
    flat = [a for a, u in zip(geometry.axes, unfolded) if u]
    side = geometry.group_channels * math.prod(a.kernel for a in flat)
    outer = geometry.batch * math.prod(a.output for a in flat) * _columns(shifted[0])
    counts = [a.counts for a in shifted]
    bare = tuple(_columns(a) for a in shifted[1:])
    reach = [c.reach for c in counts[1:]]
    padded = tuple(columns + r for columns, r in zip(bare, reach))
    # a product at shift d has d columns fewer than the map
    exact = math.prod(max(1.0, columns - r / 2) for columns, r in zip(bare, reach))
    products = math.prod(c.classes for c in counts) / 2
    copies = math.prod(c.classes for c in counts[1:])  # two, shared by d and -d
    wasted = 2 * products * side * (1 - exact / max(1, math.prod(padded)))
    zero_columns = not bare or wasted < _OPERATIONS_PER_COPY * copies
    widths = padded if zero_columns else bare
    phases = math.prod(a.phase_count for a in shifted)
    elements = phases * outer * math.prod(widths) * side * geometry.groups
    return ShiftLayout(
        shifted=shifted,
        side=side,
        zero_columns=zero_columns,
        widths=widths,
        expansion=elements / max(1, geometry.input_numel),
        rows=outer * (math.prod(widths) if zero_columns else exact),
        copies=0 if zero_columns else copies,
    )
