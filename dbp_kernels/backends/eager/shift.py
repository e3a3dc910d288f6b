"""The second moment from shifted products: one plain GEMM for every distinct tap difference.

x is copied once into a buffer of rows of channels, laid out (H, Wp, N, C) with the batch inside and
zero columns on the right that absorb all wrap-around. The block of S for taps k and k' is then
X^T Y, where Y is the same buffer (dy*Wp + dx)*N rows further on: pairs of taps with the same
difference (and the same phases, when strided) share one product, 13 instead of 81 for a 3x3 kernel.

What they do not share is the border: their windows of lattice indices differ by a few rows or
columns. Windows are cut into segments, every segment gets its own product, and each block ADDS the
segments it covers (subtracting from a full sum would lose the error bound, and one Inf in a corner
would poison every entry). The first axis is cut by slicing rows. On the inner axes the longest
segment, ``main``, uses the whole buffer with the columns outside it set to zero for the while; the
short segments are copied out.

Axes may also be *unfolded*: their taps become channels, as in im2col. With 3 input channels a
product per tap difference is too thin to be fast, and unfolding the last axis only (K times the
data, a batch chunk at a time) beats both extremes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...geometry import Axis, ConvGeometry, PairClass, Window
from .matmul import accumulation_dtype, mirror, product, symmetric_product
from .unfold import chunks, windows

Phases = tuple[int, ...]
_BLOCK_ROWS = 1 << 18  # elements of S assembled at a time, so that scattered writes stay in cache


@dataclass(frozen=True)
class Product:
    """One GEMM: row segment x inner box of a class combination, added to ``blocks``."""

    row: PairClass
    segment: Window
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Products that share their operands' inner segments."""

    inner: tuple[PairClass, ...]
    segments: tuple[Window, ...]
    main: bool
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Program:
    """All products of a shift form, and where their blocks belong.

    ``block_of[i][j]`` is (index, transposed) of the block for the shifted axes' taps i and j in
    row-major order, or None where no position sees both.
    """

    boxes: tuple[Box, ...]
    blocks: int
    block_of: tuple[tuple[tuple[int, bool] | None, ...], ...]
    widths: tuple[int, ...]  # columns of each inner axis, zero columns included


def _canonical(classes: tuple[PairClass, ...]) -> bool:
    """Of a combination of classes and its transpose exactly one is canonical."""
    for c in classes:
        if not c.self_inverse:
            return c.canonical
    return True


def reach(axis: Axis) -> int:
    """The largest shift between two taps that see a pixel each."""
    return max((abs(c.shift) for c in axis.pair_classes), default=0)


@lru_cache(maxsize=512)
def make_program(axes: tuple[Axis, ...]) -> Program:
    """The program for the shifted axes, the row axis first. Integers only, cached."""
    row_axis, *inner_axes = axes
    block_ids: dict[tuple, int] = {}

    def block_id(classes: tuple[PairClass, ...], window_ids: tuple[int, ...]) -> int:
        key = (tuple(c.key for c in classes), window_ids)
        return block_ids.setdefault(key, len(block_ids))

    boxes = []
    for inner in itertools.product(*(a.pair_classes for a in inner_axes)):
        row_classes = [r for r in row_axis.pair_classes if _canonical((*inner, r))]
        if not row_classes:
            continue
        mains = tuple(c.main for c in inner)
        for segments in itertools.product(*(c.segments for c in inner)):
            covering = [
                [i for i in range(len(c.windows)) if c.covers(i, s)]
                for c, s in zip(inner, segments)
            ]
            products = []
            for row in row_classes:
                for segment in row.segments:
                    rows = [i for i in range(len(row.windows)) if row.covers(i, segment)]
                    ids = tuple(
                        block_id((*inner, row), ids) for ids in itertools.product(*covering, rows)
                    )
                    products.append(Product(row, segment, ids))
            boxes.append(Box(inner, segments, segments == mains, tuple(products)))

    taps = list(itertools.product(*(range(a.kernel) for a in axes)))
    class_of = [{pair: c for c in a.pair_classes for pair in c.window_of} for a in axes]

    def block_of(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, bool] | None:
        row_first = list(zip(left, right))
        order = (*range(1, len(axes)), 0)  # inner axes first
        if any(row_first[a] not in class_of[a] for a in order):
            return None
        classes = tuple(class_of[a][row_first[a]] for a in order)
        if not _canonical(classes):
            block = block_of(right, left)
            return block and (block[0], True)
        window_ids = tuple(c.window_of[row_first[a]] for a, c in zip(order, classes))
        return block_id(classes, window_ids), False

    table = tuple(tuple(block_of(i, j) for j in taps) for i in taps)
    widths = tuple(max(a.lattice(p) for p in a.phases) + reach(a) for a in inner_axes)
    return Program(tuple(boxes), len(block_ids), table, widths)


def buffer_expansion(geometry: ConvGeometry, unfolded: tuple[bool, ...]) -> float:
    """Elements of the packed buffer over elements of the input."""
    ratio = 1.0
    shifted = [a for a, u in zip(geometry.axes, unfolded) if not u]
    for a, u in zip(geometry.axes, unfolded):
        if u:
            ratio *= a.output * a.kernel / a.size
        else:
            phases = len(a.phases)
            width = max(a.lattice(p) for p in a.phases)
            if a is not shifted[0]:
                width += reach(a)
            ratio *= phases * width / a.size
    return ratio


def pack(
    x: Tensor, geometry: ConvGeometry, unfolded: tuple[bool, ...], widths: tuple[int, ...]
) -> dict[Phases, Tensor]:
    """One buffer per phase combination of the shifted axes: (G, rows, *columns, N', C').

    N' is the batch times the output positions of unfolded axes, C' the group's channels times
    their taps, ordered (channel, taps).
    """
    dims = len(geometry.axes)
    shifted = [d for d in range(dims) if not unfolded[d]]
    flat = [d for d in range(dims) if unfolded[d]]
    x = windows(x, geometry, tuple(flat)).unflatten(1, (geometry.groups, geometry.group_channels))
    # now (N, G, C, *spatial, *taps of unfolded axes)
    taps = range(3 + dims, x.dim())
    x = x.permute(1, *(3 + d for d in shifted), 0, *(3 + d for d in flat), 2, *taps)
    buffers = {}
    for phases in itertools.product(*(geometry.axes[d].phases for d in shifted)):
        part = x
        for axis, (d, phase) in enumerate(zip(shifted, phases), start=1):
            index = (slice(None),) * axis + (slice(phase, None, geometry.axes[d].stride),)
            part = part[index]
        sizes = list(part.shape)
        sizes[2 : 2 + len(widths)] = widths
        buffer = torch.empty(sizes, dtype=_buffer_dtype(x), device=x.device)
        interior = buffer
        for axis, width in enumerate(widths, start=2):
            size = part.shape[axis]
            interior.narrow(axis, size, width - size).zero_()
            interior = interior.narrow(axis, 0, size)
        interior.copy_(part)
        buffer = buffer.flatten(1 + len(shifted), 1 + len(shifted) + len(flat))
        buffers[phases] = buffer.flatten(2 + len(shifted))
    return buffers


def _buffer_dtype(x: Tensor) -> torch.dtype:
    # CUDA multiplies half precision into float32; the CPU libraries do not.
    return x.dtype if x.is_cuda else accumulation_dtype(x.dtype)


@contextmanager
def _only(buffers: dict[Phases, Tensor], classes: tuple[PairClass, ...]) -> Iterator[None]:
    """Zeroes the columns outside the classes' main segments, and restores them afterwards.

    Where both operands have the same phase, a column below the window is zeroed for both: as a right
    operand it belongs to a pair whose left column lies further below, which is excluded anyway.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    for axis, c in enumerate(classes, start=1):
        start, stop = c.main
        if c.phase_left == c.phase_right:
            start, stop = min(start, start + c.shift), max(stop, stop + c.shift)
        for phases, buffer in buffers.items():
            if phases[axis] != c.phase_left:
                continue
            for columns in (
                buffer.narrow(axis + 1, 0, start),
                buffer.narrow(axis + 1, stop, buffer.shape[axis + 1] - stop),
            ):
                if columns.numel():
                    saved.append((columns, columns.clone()))
                    columns.zero_()
    yield
    for columns, values in reversed(saved):
        columns.copy_(values)


def patch_gram_shift(x: Tensor, geometry: ConvGeometry, unfolded: tuple[bool, ...]) -> Tensor:
    """S (groups, D, D) of x (N, C, *spatial); ``unfolded`` says which axes become channels.

    At least one axis is shifted, and there is at least one sample.
    """
    program = make_program(tuple(a for a, u in zip(geometry.axes, unfolded) if not u))
    g, dtype = geometry.groups, accumulation_dtype(x.dtype)
    side = geometry.group_channels * math.prod(
        a.kernel for a, u in zip(geometry.axes, unfolded) if u
    )
    if not program.blocks:  # every tap reads padding at every position
        return torch.zeros(g, geometry.dim, geometry.dim, dtype=dtype, device=x.device)
    blocks = torch.empty(program.blocks, g, side, side, dtype=dtype, device=x.device)
    scratch = torch.empty(g, side, side, dtype=dtype, device=x.device)
    written: set[int] = set()
    for part, part_geometry in chunks(x, geometry, buffer_expansion(geometry, unfolded) / 2):
        buffers = pack(part, part_geometry, unfolded, program.widths)
        for box in program.boxes:
            if box.main:
                with _only(buffers, box.inner):
                    _run(box, buffers, blocks, scratch, written)
            else:
                _run(box, _columns(box, buffers), blocks, scratch, written)
    blocks.mul_(1 / geometry.samples)
    return assemble(blocks, program, geometry, unfolded)


def _columns(box: Box, buffers: dict[Phases, Tensor]) -> dict[tuple[Phases, bool], Tensor]:
    """Contiguous copies of the box's columns, keyed by (phases, is right operand)."""
    copies = {}
    for right in (False, True):
        inner_phases = tuple(c.phase_right if right else c.phase_left for c in box.inner)
        for phases, buffer in buffers.items():
            if phases[1:] == inner_phases:
                part = buffer
                for axis, (c, (start, stop)) in enumerate(zip(box.inner, box.segments), start=2):
                    part = part.narrow(axis, start + (c.shift if right else 0), stop - start)
                copies[phases, right] = part.contiguous()
    return copies


def _run(
    box: Box,
    operands: dict,
    blocks: Tensor,
    scratch: Tensor,
    written: set[int],
) -> None:
    """All products of one box. Of the main box the operands are the buffers themselves."""
    left_phases = tuple(c.phase_left for c in box.inner)
    right_phases = tuple(c.phase_right for c in box.inner)
    for p in box.products:
        left_key, right_key = (p.row.phase_left, *left_phases), (p.row.phase_right, *right_phases)
        if box.main:
            left, right = operands[left_key], operands[right_key]
            columns = [c.shift for c in box.inner]
        else:
            left, right = operands[left_key, False], operands[right_key, True]
            columns = [0] * len(box.inner)
        offset = p.row.shift  # of the right operand, in rows of the flattened buffer
        for shift, width in zip(columns, left.shape[2:]):
            offset = offset * width + shift
        offset *= left.shape[-2]
        row_length = math.prod(left.shape[2:-1])
        X, Y = left.flatten(1, -2), right.flatten(1, -2)
        # Zero columns only are lost at either end of the buffer.
        start = max(p.segment[0] * row_length, -offset)
        stop = min(p.segment[1] * row_length, Y.shape[1] - offset)
        X, Y = X[:, start:stop], Y[:, start + offset : stop + offset]
        first, *others = p.blocks
        fresh = [b for b in p.blocks if b not in written]
        if not others:
            _multiply(X, Y, blocks[first], accumulate=first in written)
        else:
            _multiply(X, Y, scratch, accumulate=False)
            for b in p.blocks:
                blocks[b].copy_(scratch) if b in fresh else blocks[b].add_(scratch)
        written.update(fresh)


def _multiply(X: Tensor, Y: Tensor, out: Tensor, accumulate: bool) -> None:
    same = X.data_ptr() == Y.data_ptr() and X.shape == Y.shape
    if not same:
        product(X, Y, out, accumulate)
    else:
        # mirror() copies, so accumulated panels below the diagonal are simply overwritten
        symmetric_product(X, out, accumulate)
        mirror(out)


def assemble(
    blocks: Tensor, program: Program, geometry: ConvGeometry, unfolded: tuple[bool, ...]
) -> Tensor:
    """S (groups, D, D) from its distinct blocks (already divided by n)."""
    table = [pair for row in program.block_of for pair in row]
    shifted = [d for d, u in enumerate(unfolded) if not u]
    flat = [d for d, u in enumerate(unfolded) if u]
    transposed = sorted({b for b, t in filter(None, table) if t})
    position = {b: program.blocks + i for i, b in enumerate(transposed)}
    parts = [blocks]
    if transposed:
        parts.append(blocks[transposed].mT)
    if None in table:
        parts.append(torch.zeros_like(blocks[:1]))
    zero = program.blocks + len(transposed)
    sources = torch.cat(parts)
    index = torch.tensor(
        [zero if pair is None else position[pair[0]] if pair[1] else pair[0] for pair in table],
        device=blocks.device,
    )
    g, cg, kernel = geometry.groups, geometry.group_channels, geometry.kernel_size
    out = torch.empty(g, cg, *kernel, cg, *kernel, dtype=blocks.dtype, device=blocks.device)
    flat_kernel = [kernel[d] for d in flat]
    shifted_kernel = [kernel[d] for d in shifted]
    # gathered: (shifted taps, shifted taps', channels, flat taps, channels', flat taps')
    n = len(kernel)
    where_shifted = {d: i for i, d in enumerate(shifted)}
    where_flat = {d: i for i, d in enumerate(flat)}
    s, f = len(shifted), len(flat)

    def tap_axes(side: int) -> list[int]:
        return [
            where_shifted[d] + side * s
            if d in where_shifted
            else 2 * s + 1 + where_flat[d] + side * (1 + f)
            for d in range(n)
        ]

    order = [2 * s, *tap_axes(0), 2 * s + 1 + f, *tap_axes(1)]
    step = max(1, _BLOCK_ROWS // max(1, geometry.taps * geometry.dim))
    taps_flat = math.prod(flat_kernel)
    for group in range(g):
        for start in range(0, cg, step):
            stop = min(start + step, cg)
            rows = sources[:, group, start * taps_flat : stop * taps_flat]
            gathered = rows.index_select(0, index).view(
                *shifted_kernel, *shifted_kernel, stop - start, *flat_kernel, cg, *flat_kernel
            )
            out[group, start:stop].copy_(gathered.permute(order))
    return out.view(g, geometry.dim, geometry.dim)
