"""The second moment from shifted products: one plain GEMM for every distinct tap difference.

x is copied once into a buffer of rows of channels, laid out (H, Wp, N, C) with the batch inside and
zero columns on the right that absorb all wrap-around. The block of S for taps k and k' is then
X^T Y, where Y is the same buffer (dy*Wp + dx)*N rows further on: pairs of taps with the same
difference (and the same phases, when strided) share one product, 13 instead of 81 for a 3x3 kernel.

What they do not share is the border: their windows of lattice indices differ by a few rows or
columns. Windows are cut into segments, every segment gets its own product, and each block ADDS the
segments it covers (subtracting from a full sum would lose the error bound, and turn one Inf in a
corner into NaN everywhere; as it is, Inf times a zero column can reach tap pairs of its own channel
that im2col keeps finite, no others). The first axis is cut by slicing rows. On the inner axes the longest
segment, ``main``, uses the whole buffer with the columns outside it set to zero for the while; the
short segments are copied out. On small maps, where zero columns would be a large part of the
buffer, there are none, and every segment is copied out.

Axes may also be *unfolded*: their taps become channels, as in im2col. With 3 input channels a
product per tap difference is too thin to be fast, and unfolding the last axis only (K times the
data, some images at a time) beats both extremes. Where no columns are left, channels may come first
in memory: to an input that has them so the copy is then one of runs of pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dbp_kernels.backends.eager.unfold import channels_first, chunks, windows
from dbp_kernels.planning.axis import Window
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.kept import kept
from dbp_kernels.planning.layout import (
    Band,
    Product,
    ShiftLayout,
    ShiftProgram,
    make_program,
    panels,
    shift_layout,
)
from dbp_kernels.precision import product_dtype, statistics_dtype
from dbp_kernels.products.matmul import mirror, product, upper_product

Phases = tuple[int, ...]

# Elements of S assembled at a time, so that its scattered writes stay in the cache; and from how
# many on taps are copied one by one.
_ASSEMBLED_ELEMENTS, _BY_TAP = 1 << 18, 1 << 14
# A transposing copy moves channels in steps of one cache line (of float32) once an image has so
# many pixels that lines would be evicted before they are used up.
_LINE, _MANY_PIXELS = 16, 512


# --------------------------------------------------------------------------- operands


def pack(
    x: Tensor, geometry: ConvGeometry, unfolded: tuple[bool, ...], widths: tuple[int, ...]
) -> dict[Phases, Tensor]:
    """One buffer per phase combination of the shifted axes: (G, rows, *columns, N', C').

    N' is the batch times the output positions of unfolded axes, C' their taps times the group's
    channels, ordered (taps, channel). Without columns the memory may be ``channels_first``.
    """
    dims, dtype = len(geometry.axes), product_dtype(x)
    # with columns, setting some of them to zero for the while would be slower than what is gained
    pixels_run = not widths and not x.is_cuda and x.stride(1) != 1
    shifted = [d for d in range(dims) if not unfolded[d]]
    flat = [d for d in range(dims) if unfolded[d]]
    x = windows(x, geometry, tuple(flat)).unflatten(1, (geometry.groups, geometry.group_channels))
    # now (N, G, C, *spatial, *taps of unfolded axes)
    taps = range(3 + dims, x.dim())
    x = x.permute(1, *(3 + d for d in shifted), 0, *(3 + d for d in flat), *taps, 2)
    channels = 2 + dims
    buffers = {}
    for phases in itertools.product(*(geometry.axes[d].phases for d in shifted)):
        part = x
        for axis, (d, phase) in enumerate(zip(shifted, phases), start=1):
            index = (slice(None),) * axis + (slice(phase, None, geometry.axes[d].stride),)
            part = part[index]
        sizes = list(part.shape)
        sizes[2 : 2 + len(widths)] = widths
        if pixels_run:
            buffer = channels_first(sizes, channels, dtype, x.device)
        else:
            buffer = torch.empty(sizes, dtype=dtype, device=x.device)
        interior = buffer
        for axis, width in enumerate(widths, start=2):
            size = part.shape[axis]
            interior.narrow(axis, size, width - size).zero_()
            interior = interior.narrow(axis, 0, size)
        transposing = not (pixels_run or x.is_cuda) and part.stride(-1) != 1
        if transposing and math.prod(a.size for a in geometry.axes) >= _MANY_PIXELS:
            for start in range(0, part.shape[-1], _LINE):
                line = (-1, start, min(_LINE, part.shape[-1] - start))
                interior.narrow(*line).copy_(part.narrow(*line))
        else:
            interior.copy_(part)
        buffer = buffer.flatten(1 + len(shifted), 1 + len(shifted) + len(flat))
        buffers[phases] = buffer.flatten(2 + len(shifted))
    return buffers


@contextmanager
def _only_main(buffers: dict[Phases, Tensor], band: Band) -> Iterator[None]:
    """Zeroes the columns outside a main band's segments, and restores them afterwards.

    Where both operands have the same phase, a column below the window is zeroed for both: as a right
    operand it belongs to a pair whose left column lies further below, which is excluded anyway.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    for axis, (c, (start, stop)) in enumerate(zip(band.inner, band.segments), start=1):
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


# (phases, column ranges) -> those columns of that phase's buffer, contiguous
_Copies = dict[tuple[Phases, tuple[Window, ...]], Tensor]
_Side = tuple[Phases, tuple[Window, ...]]  # an operand's inner phases and column ranges


def _copy_columns(
    sides: tuple[_Side, _Side], buffers: dict[Phases, Tensor], previous: _Copies
) -> _Copies:
    """The columns of both operands of a band; those that the previous band had too are kept."""
    copies: _Copies = {}
    for inner_phases, segments in sides:
        for phases, buffer in buffers.items():
            key = (phases, segments)
            if phases[1:] == inner_phases and key not in copies:
                if key in previous:
                    copies[key] = previous[key]
                    continue
                part = buffer
                for axis, (start, stop) in enumerate(segments, start=2):
                    part = part.narrow(axis, start, stop - start)
                copies[key] = part.contiguous()
    return copies


def _operand(band: Band, right: bool) -> _Side:
    """Inner phases and column ranges of the left or the right operand."""
    if not right:
        return tuple(c.phase_left for c in band.inner), band.segments
    segments = tuple((a + c.shift, b + c.shift) for c, (a, b) in zip(band.inner, band.segments))
    return tuple(c.phase_right for c in band.inner), segments


# --------------------------------------------------------------------------- products


# X, Y (G, n, side), and what X^T Y belongs to.
_Operands = tuple[Tensor, Tensor, Product]


class _Blocks:
    """The distinct blocks, (blocks, G, side, side), whatever is in them at first."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._scratch = torch.empty_like(tensor[0])
        self._written: set[int] = set()  # first blocks of class combinations

    def target(self, p: Product) -> tuple[Tensor, bool]:
        """Where a product is to be written (G, side, side), and whether added to what is there."""
        if math.prod(p.windows) > 1:
            return self._scratch, False
        written = p.block in self._written
        self._written.add(p.block)
        return self.tensor[p.block], written

    def spread(self, p: Product) -> None:
        """Adds what is in the target to all blocks that the product belongs to."""
        count, covered = math.prod(p.windows), math.prod(b - a for a, b in p.covering)
        if count == 1:
            return  # it is in its block
        written = p.block in self._written
        self._written.add(p.block)
        blocks = self.tensor[p.block : p.block + count]
        if covered < count:
            if not written:
                blocks.zero_()
                written = True
            blocks = blocks.unflatten(0, p.windows)[tuple(slice(*c) for c in p.covering)]
        blocks.add_(self._scratch) if written else blocks.copy_(self._scratch)


def _operands(
    program: ShiftProgram, layout: ShiftLayout, buffers: dict[Phases, Tensor]
) -> Iterator[_Operands]:
    """Those of all products. A main band's are the buffers, which must stay as they are meanwhile."""
    rows = {phases: buffer.flatten(1, -2) for phases, buffer in buffers.items()}
    images = next(iter(buffers.values())).shape[-2]
    copies: _Copies = {}
    for band in program.bands:
        sides = _operand(band, False), _operand(band, True)
        if band.main and layout.zero_columns:
            with _only_main(buffers, band):
                yield from _main_operands(band, sides, rows, layout.widths, images)
        else:
            copies = _copy_columns(sides, buffers, copies)
            yield from _column_operands(band, sides, copies)


def _main_operands(
    band: Band,
    sides: tuple[_Side, _Side],
    rows: dict[Phases, Tensor],
    widths: tuple[int, ...],
    images: int,
) -> Iterator[_Operands]:
    """A main band on the whole buffers, as rows of channels: a shift is an offset in rows."""
    (left_phases, _), (right_phases, _) = sides
    row_length = math.prod(widths) * images
    for p in band.products:
        left = p.row.phase_left, *left_phases
        right = p.row.phase_right, *right_phases
        X, Y = rows[left], rows[right]
        offset = p.row.shift
        for c, width in zip(band.inner, widths):
            offset = offset * width + c.shift
        offset *= images
        # only zero columns are lost at either end of the buffer
        start = max(p.segment[0] * row_length, -offset)
        stop = min(p.segment[1] * row_length, Y.shape[1] - offset)
        yield X[:, start:stop], Y[:, start + offset : stop + offset], p


def _column_operands(
    band: Band, sides: tuple[_Side, _Side], copies: _Copies
) -> Iterator[_Operands]:
    """A band on copied columns: only the rows are left to slice."""
    (left_phases, left_columns), (right_phases, right_columns) = sides
    for p in band.products:
        left = copies[(p.row.phase_left, *left_phases), left_columns]
        right = copies[(p.row.phase_right, *right_phases), right_columns]
        start, stop = p.segment
        X = left[:, start:stop].flatten(1, -2)
        Y = right[:, start + p.row.shift : stop + p.row.shift].flatten(1, -2)
        yield X, Y, p


def patch_gram_shift(x: Tensor, geometry: ConvGeometry, unfolded: tuple[bool, ...]) -> Tensor:
    """S (groups, D, D) of x (N, C, *spatial); ``unfolded`` says which axes become channels.

    At least one axis is shifted, and there is at least one sample.
    """
    layout = shift_layout(geometry, unfolded)
    program = make_program(layout.shifted)
    g, dtype = geometry.groups, statistics_dtype(x.dtype)
    if not program.blocks:  # every tap reads padding at every position
        return torch.zeros(g, geometry.dim, geometry.dim, dtype=dtype, device=x.device)
    shape = (program.sources, g, layout.side, layout.side)
    sources = torch.empty(shape, dtype=dtype, device=x.device)
    blocks = _Blocks(sources[: program.blocks])
    for part, part_geometry in chunks(x, geometry, layout.expansion, 2):
        buffers = pack(part, part_geometry, unfolded, layout.widths)
        for X, Y, p in _operands(program, layout, buffers):
            out, accumulate = blocks.target(p)
            if X.data_ptr() == Y.data_ptr() and X.shape == Y.shape:
                count = panels(X.shape[-1], X.shape[1], X.is_cuda)
                upper_product(X, X, out, accumulate, count)
                mirror(out, count)  # what is below the diagonal is overwritten, added to or not
            else:
                product(X, Y, out, accumulate)
            blocks.spread(p)
        del buffers, X, Y
    blocks.tensor.div_(geometry.samples)
    sources[program.blocks : -1].copy_(blocks.tensor[program.symmetric :].mT)
    sources[-1].zero_()
    return _assemble(sources, program, geometry, unfolded)


@kept(mebibytes=16)
def _source_index(program: ShiftProgram, device: torch.device) -> Tensor:
    # kept: on a GPU making it anew would wait for the device at every call
    with torch.inference_mode(False):
        return torch.frombuffer(program.source_of, dtype=torch.int32).to(device)


def _assemble(
    sources: Tensor, program: ShiftProgram, geometry: ConvGeometry, unfolded: tuple[bool, ...]
) -> Tensor:
    """S (groups, D, D) from the blocks for each pair of shifted taps, some channels at a time."""
    g, cg, kernel = geometry.groups, geometry.group_channels, geometry.kernel_size
    out = torch.empty(g, cg, *kernel, cg, *kernel, dtype=sources.dtype, device=sources.device)
    index = _source_index(program, sources.device)
    dims = len(kernel)
    shifted, flat = ([d for d in range(dims) if unfolded[d] is u] for u in (False, True))
    shifted_kernel, flat_kernel = [kernel[d] for d in shifted], [kernel[d] for d in flat]
    s, f = len(shifted), len(flat)
    # gathered: (shifted taps, shifted taps', groups, flat taps, channels, flat taps', channels')
    left_taps, right_taps = [0] * dims, [0] * dims
    for i, d in enumerate(shifted):
        left_taps[d], right_taps[d] = i, s + i
    for i, d in enumerate(flat):
        left_taps[d], right_taps[d] = 2 * s + 1 + i, 2 * s + f + 2 + i
    order = [2 * s, 2 * s + f + 1, *left_taps, 2 * s + 2 * f + 2, *right_taps]
    one_channel = max(1, geometry.taps * geometry.dim)
    channels = max(1, min(cg, _ASSEMBLED_ELEMENTS // one_channel))
    groups = max(1, min(g, _ASSEMBLED_ELEMENTS // (channels * one_channel)))
    sources = sources.view(-1, g, math.prod(flat_kernel), cg, math.prod(flat_kernel) * cg)
    for group, start in itertools.product(range(0, g, groups), range(0, cg, channels)):
        these = (slice(group, group + groups), slice(start, start + channels))
        part = sources[:, these[0], :, these[1]].index_select(0, index)
        _, wide, _, high, _ = part.shape
        gathered = part.view(
            *shifted_kernel, *shifted_kernel, wide, *flat_kernel, high, *flat_kernel, cg
        )
        _copy_by_tap(out[these], gathered.permute(order), [3 + dims + d for d in flat])
    return out.view(g, geometry.dim, geometry.dim)


def _copy_by_tap(target: Tensor, source: Tensor, axes: list[int]) -> None:
    """Copies; if there is much, for each index of ``axes`` by itself.

    Those are short and innermost, and a copy of one with long axes left is several times as fast.
    """
    if not axes or target.numel() < _BY_TAP:
        target.copy_(source)
        return
    first, *rest = axes
    for one, other in zip(target.unbind(first), source.unbind(first)):
        _copy_by_tap(one, other, [axis - 1 for axis in rest])
