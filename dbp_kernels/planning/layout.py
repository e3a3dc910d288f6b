"""How the eager backend computes a second moment, as integers: what it multiplies, cut how, in which buffers.

The planner needs the same numbers for its costs. "Shift" is explained in ``backends/eager/shift.py``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from dbp_kernels.planning.boxes import canonical, tap_pair
from dbp_kernels.planning.geometry import Axis, ConvGeometry, PairClass, Window, cut

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


@lru_cache(maxsize=1024)
def tap_windows(axis: Axis, phase: int) -> dict[int, Window]:
    """Non-empty lattice windows of the taps that read ``phase``."""
    windows = {}
    for k in range(axis.kernel):
        tap_phase, shift = axis.tap(k)
        start, stop = axis.valid(k)
        if tap_phase == phase and start < stop:
            windows[k] = (start + shift, stop + shift)
    return windows


def wgrad_convolutions(geometry: ConvGeometry) -> int:
    """How many weight-gradient convolutions ``self_wgrad`` runs."""
    total = 1
    for axis in geometry.axes:
        total *= sum(len(cut(tap_windows(axis, p).values())) for p in axis.phases)
    return total


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


@dataclass(frozen=True)
class ShiftProgram:
    """All products of a shift form, and where their blocks belong.

    ``sources`` lists what S is made of: the ``blocks`` distinct blocks, then copies: the index of
    the block to transpose, or None for zeros where no position sees both taps. ``source_of`` has the
    index of the source for each pair of the shifted axes' taps, in row-major order.
    """

    bands: tuple[Band, ...]
    blocks: int
    sources: tuple[int | None, ...]
    source_of: tuple[int, ...]


def _covering(c: PairClass, segment: Window) -> Window:
    """The range of the class's windows that contain a segment."""
    # windows move one way from tap to tap: those around a segment follow each other
    indices = [i for i in range(len(c.windows)) if c.covers(i, segment)]
    return indices[0], indices[-1] + 1


def _main_first(c: PairClass) -> list[Window]:
    return sorted(c.segments, key=lambda segment: segment != c.main)


@lru_cache(maxsize=512)
def make_program(axes: tuple[Axis, ...]) -> ShiftProgram:
    """The program for the shifted axes, the row axis first. Integers only, cached."""
    row_axis, *inner_axes = axes
    first_blocks: dict[tuple[tuple[int, int, int], ...], int] = {}
    blocks = 0

    def first_block(classes: tuple[PairClass, ...]) -> int:
        nonlocal blocks
        key = tuple(c.key for c in classes)
        if key not in first_blocks:
            first_blocks[key] = blocks
            blocks += math.prod(len(c.windows) for c in classes)
        return first_blocks[key]

    bands = []
    # shifts d and -d in turn: they share the columns that are copied out
    by_shift = (sorted(a.pair_classes, key=lambda c: abs(c.shift)) for a in inner_axes)
    for inner in itertools.product(*by_shift):
        row_classes = [r for r in row_axis.pair_classes if canonical((*inner, r))]
        if not row_classes:
            continue
        mains = tuple(c.main for c in inner)
        for segments in itertools.product(*map(_main_first, inner)):
            covering = [_covering(c, s) for c, s in zip(inner, segments)]
            products = []
            for row in row_classes:
                classes = (*inner, row)
                block, counts = first_block(classes), tuple(len(c.windows) for c in classes)
                for segment in _main_first(row):
                    covered = (*covering, _covering(row, segment))
                    products.append(Product(row, segment, block, counts, covered))
            bands.append(Band(inner, segments, segments == mains, tuple(products)))

    taps = list(itertools.product(*(range(a.kernel) for a in axes)))
    sources: dict[int | tuple[int, str] | None, int] = {b: b for b in range(blocks)}

    def source(left: tuple[int, ...], right: tuple[int, ...]) -> int | tuple[int, str] | None:
        found = tap_pair((*inner_axes, row_axis), left[1:] + left[:1], right[1:] + right[:1])
        if found is None:
            return None
        place = 0
        for c, window in zip(found.classes, found.windows):
            place = place * len(c.windows) + window
        block = first_block(found.classes) + place
        return (block, "transposed") if found.transposed else block

    source_of = tuple(sources.setdefault(source(i, j), len(sources)) for i in taps for j in taps)
    listed = tuple(key[0] if isinstance(key, tuple) else key for key in sources)
    return ShiftProgram(tuple(bands), blocks, listed, source_of)


def _reach(axis: Axis) -> int:
    """The largest shift between two taps that see a pixel each."""
    return max((abs(c.shift) for c in axis.pair_classes), default=0)


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


@lru_cache(maxsize=4096)
def shift_layout(geometry: ConvGeometry, unfolded: tuple[bool, ...]) -> ShiftLayout:
    """The layout for a geometry with the given axes unfolded, at least one of them not."""
    shifted = tuple(a for a, u in zip(geometry.axes, unfolded) if not u)
    flat = [a for a, u in zip(geometry.axes, unfolded) if u]
    side = geometry.group_channels * math.prod(a.kernel for a in flat)
    outer = geometry.batch * math.prod(a.output for a in flat) * _columns(shifted[0])
    inner = shifted[1:]
    bare = tuple(_columns(a) for a in inner)
    padded = tuple(_columns(a) + _reach(a) for a in inner)
    # a product at shift d has d columns fewer than the map
    exact = math.prod(max(1.0, w - _reach(a) / 2) for a, w in zip(inner, bare))
    products = math.prod(len(a.pair_classes) for a in shifted) / 2
    copies = math.prod(len(a.pair_classes) for a in inner)  # two, shared by d and -d
    wasted = 2 * products * side * (1 - exact / max(1, math.prod(padded)))
    zero_columns = not inner or wasted < _OPERATIONS_PER_COPY * copies
    widths = padded if zero_columns else bare
    phases = math.prod(len(a.phases) for a in shifted)
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
