"""The shift form on tensor descriptors: tiles are fetched by the copy engine (TMA) of Hopper and later.

A descriptor's tile is a run of consecutive rows, so the input is packed with the batch inside:
rows of channels ordered (phase, z, y, x, image). The pixels of a box on one line (z, y) then are one
run of rows, however small the image is, and so are the pixels a constant offset away. A run's
``full`` tiles of BLOCK_K rows go by descriptor, its ``tail`` rows by masked pointers; within a box
the tiles of all runs come first, then all tails. Items, slots and the reduction are those of
``gram_shift.py``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.backends.rows import padded, vector
from dbp_kernels.backends.tables import make_tables, reciprocal, signed
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import Config, configs, pinned, precision_key
from dbp_kernels.backends.triton.dot import dot
from dbp_kernels.backends.triton.gram_shift import divide, programs, sizes
from dbp_kernels.backends.triton.pack import pack_into
from dbp_kernels.backends.triton.reduce import reduction
from dbp_kernels.backends.triton.runtime import KernelCase, Launch
from dbp_kernels.planning.axis import Axis
from dbp_kernels.planning.boxes import AXES, Box
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.kept import kept
from dbp_kernels.planning.work import MAX_PIXELS, Work, shift_work, tile_pairs

KERNEL = "gram_shift_tma"
_MAX_INT = 2**31 - 1
_WORDS = 14  # of a box's row in the table, see _run_words


@triton.jit(do_not_specialize=("channels",))
def gram_shift_tma_kernel(
    tiles,  # descriptor of the rows, (BLOCK_K, BLOCK) at a time
    rows,  # the same memory, (rows, channels)
    workspace,  # (slots, BLOCK, BLOCK)
    items,  # see work.Tables
    runs,  # see _run_words
    channels,  # of a row, in vectors
    VECTOR: tl.constexpr,  # elements in 16 bytes
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One item: a partial tile of one block."""
    item = items + tl.program_id(0) * 6
    run = runs + tl.load(item) * 14
    i = tl.load(item + 1) * BLOCK
    j = tl.load(item + 2) * BLOCK
    first = tl.load(item + 3)
    last = tl.load(item + 4)
    slot = tl.load(item + 5)
    start, offset = tl.load(run), tl.load(run + 1)
    pitch_z, pitch_y, size_y = tl.load(run + 2), tl.load(run + 3), tl.load(run + 4)
    full, tiled = tl.load(run + 7), tl.load(run + 10)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for p in range(first, min(last, tiled), BLOCK_K):
        tile = p // BLOCK_K
        line = divide(tile, run + 8)
        z = divide(line, run + 5)
        row = start + z * pitch_z + (line - z * size_y) * pitch_y + (tile - line * full) * BLOCK_K
        a = tiles.load([row, i])
        b = tiles.load([row + offset, j])
        acc = dot(tl.trans(a), b, acc, "ieee", UPCAST)

    tail = tl.load(run + 11)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK)
    i_inside = (i + m < channels * VECTOR)[:, None]
    j_inside = (j + m < channels * VECTOR)[None, :]
    for p in range(max(first, tiled), last, BLOCK_K):
        t = p - tiled + k
        line = divide(t, run + 12)
        z = divide(line, run + 5)
        row = start + z * pitch_z + (line - z * size_y) * pitch_y + full * BLOCK_K + t - line * tail
        inside = p + k < last
        right = row + offset
        if INDEX64:
            row, right = row.to(tl.int64), right.to(tl.int64)
        row = row * channels * VECTOR
        right = right * channels * VECTOR
        a = tl.load(rows + row[None, :] + (i + m)[:, None], inside[None, :] & i_inside, other=0.0)
        b = tl.load(rows + right[:, None] + (j + m)[None, :], inside[:, None] & j_inside, other=0.0)
        acc = dot(a, b, acc, "ieee", UPCAST)

    if INDEX64:
        slot = slot.to(tl.int64)
    tl.store(workspace + slot * (BLOCK * BLOCK) + m[:, None] * BLOCK + m[None, :], acc)


# --------------------------------------------------------------------------- the packed rows


@dataclass(frozen=True)
class Layout:
    """Rows ordered (phase, z, y, x, image): what the planes of phases are, and their sizes."""

    axes: tuple[Axis, ...]  # always three, the first ones of size 1 if need be
    batch: int

    @cached_property
    def phases(self) -> list[tuple[int, ...]]:
        """The phases some tap reads, one plane each."""
        return list(itertools.product(*(a.phases for a in self.axes)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lattice pixels of a plane (z, y, x): room for the largest phase."""
        return tuple(-(-a.size // a.stride) for a in self.axes)

    @property
    def rows(self) -> int:
        """Rows in all."""
        return len(self.phases) * math.prod(self.sizes) * self.batch

    def row(self, pixel: tuple[int, ...]) -> int:
        """Row of a pixel (z, y, x) of the first image."""
        position = [divmod(p, a.stride) for p, a in zip(pixel, self.axes)]
        row = self.phases.index(tuple(phase for _, phase in position))
        for (index, _), size in zip(position, self.sizes):
            row = row * size + index
        return row * self.batch


def layout(geometry: ConvGeometry) -> Layout:
    """The layout of a convolution's input."""
    single = (Axis(1, 1, 1, 0, 1),) * (AXES - len(geometry.axes))
    return Layout(single + geometry.axes, geometry.batch)


def pack_rows(x: Tensor, geometry: ConvGeometry, index64: bool = False) -> Tensor:
    """x (N, C, *spatial) as rows (rows, C'); what no tap reads is left unwritten."""
    rows = layout(geometry)
    channels = padded(x.shape[1], x.dtype)
    out = torch.empty(rows.rows, channels, dtype=x.dtype, device=x.device)
    planes = out.view(len(rows.phases), *rows.sizes, rows.batch, channels)
    x = x.reshape(*x.shape[:2], *(1,) * (AXES + 2 - x.dim()), *x.shape[2:])
    for plane, phases in zip(planes, rows.phases):
        part = x
        for d, (phase, axis) in enumerate(zip(phases, rows.axes)):
            part = part[(slice(None),) * (2 + d) + (slice(phase, None, axis.stride),)]
            plane = plane.narrow(d, 0, part.shape[2 + d])
        pack_into(plane.permute(3, 4, 0, 1, 2), part, index64=index64)
    return out


def _run_words(box: Box, rows: Layout, block_k: int) -> list[int]:
    """First row, rows from left to right pixel, pitches of z and y in rows, lines of y and their
    reciprocal, tiles of a run and their reciprocal, pixels in tiles of all runs, rows of a tail
    and their reciprocal.
    """
    start = rows.row(box.start)
    right = rows.row(tuple(s + d for s, d in zip(box.start, box.offset)))
    lines_z, lines_y, width = box.size
    pitch_y = rows.sizes[2] * rows.batch
    full, tail = divmod(width * rows.batch, block_k)

    def divisor(n: int) -> list[int]:
        multiplier, shift = reciprocal(max(1, n))
        return [signed(multiplier), shift]

    return [
        *(start, right - start, rows.sizes[1] * pitch_y, pitch_y),
        *(lines_y, *divisor(lines_y)),
        *(full, *divisor(full)),
        *(lines_z * lines_y * full * block_k, tail, *divisor(tail)),
    ]


@kept(mebibytes=32)
def _run_table(work: Work, rows: Layout, block_k: int, device: torch.device) -> Tensor:
    words = [_run_words(box, rows, block_k) for box in work.program.boxes]
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int32).reshape(-1, _WORDS).to(device)


# --------------------------------------------------------------------------- entry


def usable(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether this form covers the input: a GPU with TMA, 16-bit elements, not too many rows.

    float32 is excluded because wgmma reads tf32 operands only with the pixels contiguous.
    """
    tma = runtime.target(x.device) >= 90
    return tma and x.dtype.itemsize == 2 and layout(geometry).rows <= MAX_PIXELS


@lru_cache(maxsize=1024)
def choose(channels: int, group_channels: int, target: int) -> Config:
    """The largest tile, unless channels leave more than half of it empty."""
    large, *others = configs(KERNEL, "bf16", target)
    pairs = len(tile_pairs(channels, group_channels, large.block_m))
    for config in others:
        ratio = (large.block_m / config.block_m) ** 2
        if 2 * len(tile_pairs(channels, group_channels, config.block_m)) <= ratio * pairs:
            return config
    return large


@prepared
def tma_gram(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Gram:
    """What ``patch_gram_shift_tma`` does, for inputs that look like x."""
    target = runtime.target(x.device)
    if config is None:
        config = pinned(KERNEL, precision_key(x.dtype), sizes(geometry), x.device)
        config = config or choose(geometry.channels, geometry.group_channels, target)
    parallel = programs(x, config) if parallel is None else parallel
    block, block_k = config.block_m, config.block_k
    work = shift_work(geometry, block, block_k, parallel)
    tables = make_tables(work, x.device)
    channels = padded(x.shape[1], x.dtype)
    numel = layout(geometry).rows * channels
    launch = Launch(
        gram_shift_tma_kernel,
        (len(work.items),),
        tables.items,
        _run_table(work, layout(geometry), block_k, x.device),
        channels // vector(x.dtype),
        VECTOR=vector(x.dtype),
        BLOCK=block,
        BLOCK_K=block_k,
        INDEX64=index64 or max(numel, work.workspace) > _MAX_INT,
        UPCAST=runtime.INTERPRET and x.dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    def product(x: Tensor, workspace: Tensor) -> None:
        tiles = TensorDescriptor.from_tensor(x, [block_k, block])
        launch(tiles=tiles, rows=x, workspace=workspace)

    return Gram(
        steps=(partial(pack_rows, geometry=geometry, index64=index64),),
        products=(product,),
        workspace=work.workspace,
        reduce=reduction(work, tables, geometry.samples, index64),
        shape=(geometry.groups, geometry.dim, geometry.dim),
    )


def patch_gram_shift_tma(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Tensor:
    """As ``gram_shift.patch_gram_shift``, for what is ``usable``."""
    return tma_gram(x, geometry, config, parallel, index64)(x)


# --------------------------------------------------------------------------- what is shipped


def cases(target: int) -> list[KernelCase]:
    """Both 16-bit elements, with 32-bit and 64-bit addresses.

    Before sm_90 Triton replaces descriptors by pointers, and the pointer kernel is the better one:
    one small tile is compiled there, to know that it can be.
    """
    found = []
    for element in ("bf16", "fp16"):
        for config in configs(KERNEL, element, target):
            for wide in (False, True):
                tile = f"[{config.block_k},{config.block_m}]"
                signature = {
                    "tiles": f"tensordesc<{element}{tile}>",
                    "rows": f"*{element}",
                    "workspace": "*fp32",
                    "items": "*i32",
                    "runs": "*i32",
                    "channels": "i32",
                }
                constexprs = {
                    "VECTOR": 8,
                    "BLOCK": config.block_m,
                    "BLOCK_K": config.block_k,
                    "INDEX64": wide,
                    "UPCAST": False,
                }
                found.append(
                    KernelCase(
                        name=f"{KERNEL}[{element}, {config.text}{', int64' * wide}]",
                        kernel=gram_shift_tma_kernel,
                        signature=signature,
                        constexprs=constexprs,
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                        tensor_cores=True,
                    )
                )
    return found
