"""The second moment from shifted products: no im2col, every distinct product computed once.

One program multiplies, for one box of pixels (see ``boxes.py``), a tile of channels of the left
pixels with a tile of channels of the pixels a constant offset away, over a part of the box. The
pixels of a box exist for both operands, so there are no border masks, and the input is read in
place where its channels are contiguous.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.backends.rows import to_rows, vector
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import Config, configs, pinned, precision_key
from dbp_kernels.backends.triton.dot import dot
from dbp_kernels.backends.triton.pack import pack
from dbp_kernels.backends.triton.reduce import reduction
from dbp_kernels.backends.triton.runtime import KernelCase, Launch
from dbp_kernels.planning.boxes import AXES
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.work import Work, shift_work, tile_pairs

_MAX_INT = 2**31 - 1


@triton.jit
def divide(p, reciprocal):
    """p // divisor for 0 <= p < 2**31; ``reciprocal`` points to tables.reciprocal(divisor)."""
    twice = (p * 2).to(tl.uint32, bitcast=True)
    multiplier = tl.load(reciprocal).to(tl.uint32, bitcast=True)
    shift = tl.load(reciprocal + 1).to(tl.uint32, bitcast=True)
    return (tl.umulhi(twice, multiplier) >> shift).to(tl.int32, bitcast=True)


@triton.jit
def pixel_offset(
    p, box, stride_n, step_z, step_y, step_x, AXES: tl.constexpr, INDEX64: tl.constexpr
):
    """Where the left pixels numbered p lie, relative to the first one of the box."""
    line = divide(p, box + 9)
    x = p - line * tl.load(box + 5)
    y, z, n = tl.zeros_like(p), tl.zeros_like(p), line
    if AXES > 1:
        n = divide(line, box + 11)
        y = line - n * tl.load(box + 4)
    if AXES > 2:
        line = n
        n = divide(line, box + 13)
        z = line - n * tl.load(box + 3)
    if INDEX64:
        x, y, z, n = x.to(tl.int64), y.to(tl.int64), z.to(tl.int64), n.to(tl.int64)
    offset = n * stride_n + x * step_x
    if AXES > 1:
        offset += y * step_y
    if AXES > 2:
        offset += z * step_z
    return offset


_STRIDES = ("stride_n", "stride_z", "stride_y", "stride_x", "step_z", "step_y", "step_x")


@triton.jit(do_not_specialize=("channels", *_STRIDES))
def gram_shift_kernel(
    x,
    workspace,  # (slots, BLOCK, BLOCK)
    items,  # tables, see work.Tables
    boxes,
    channels,  # sizes and strides in vectors
    stride_n,
    stride_z,
    stride_y,
    stride_x,
    step_z,  # strides times those of the convolution
    step_y,
    step_x,
    AXES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements in 16 bytes
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One item: a partial tile of one block."""
    item = items + tl.program_id(0) * 6
    box = boxes + tl.load(item) * 15
    i = tl.load(item + 1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(item + 2) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(item + 3)
    last = tl.load(item + 4)
    slot = tl.load(item + 5)
    z, y, x_ = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    dz, dy, dx = tl.load(box + 6), tl.load(box + 7), tl.load(box + 8)
    if INDEX64:
        z, y, x_, slot = z.to(tl.int64), y.to(tl.int64), x_.to(tl.int64), slot.to(tl.int64)
        dz, dy, dx = dz.to(tl.int64), dy.to(tl.int64), dx.to(tl.int64)
    left = x + (z * stride_z + y * stride_y + x_ * stride_x) * VECTOR
    right = left + (dz * stride_z + dy * stride_y + dx * stride_x) * VECTOR
    i_inside = (i < channels * VECTOR)[:, None]
    j_inside = (j < channels * VECTOR)[None, :]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for p in range(first, last, BLOCK_K):
        row = pixel_offset(p + k, box, stride_n, step_z, step_y, step_x, AXES, INDEX64)
        row = row * VECTOR
        inside = k < last - p
        # transposed by its pointers: a transposition in registers would not be prefetched
        a = tl.load(left + row[None, :] + i[:, None], mask=inside[None, :] & i_inside, other=0.0)
        b = tl.load(right + row[:, None] + j[None, :], mask=inside[:, None] & j_inside, other=0.0)
        acc = dot(a, b, acc, PRECISION, UPCAST)
    m = tl.arange(0, BLOCK)
    tile = workspace + slot * (BLOCK * BLOCK) + m[:, None] * BLOCK + m[None, :]
    tl.store(tile, acc)


# --------------------------------------------------------------------------- configurations

KERNEL = "gram_shift"
# What a tile costs per element of the block, against the largest.
_COST = {128: 1.0, 64: 1.25, 32: 2.0, 16: 4.0}


def sizes(geometry: ConvGeometry) -> dict[str, int]:
    """What a problem is called when its fastest configuration is measured."""
    pixels = geometry.input_numel // geometry.channels
    return {"group_channels": geometry.group_channels, "groups": geometry.groups, "pixels": pixels}


@lru_cache(maxsize=1024)
def choose(channels: int, group_channels: int, precision: str, target: int) -> Config:
    """The configuration whose tiles waste least."""

    def cost(config: Config) -> float:
        block = config.block_m
        return len(tile_pairs(channels, group_channels, block)) * block**2 * _COST[block]

    return min(configs(KERNEL, precision, target), key=cost)


def resident(config: Config, itemsize: int, target: int) -> int:
    """Programs that fit on one multiprocessor at a time, about."""
    tiles = config.num_stages * (config.block_m + config.block_n) * config.block_k * itemsize
    threads = 32 * config.num_warps
    registers = threads * (config.block_m * config.block_n // threads + 72)
    fit = min(runtime.shared_limit(target) // tiles, 65536 // registers, 1536 // threads)
    return max(1, fit)


def programs(x: Tensor, config: Config) -> int:
    """Those that run on x's device at the same time, about."""
    target = runtime.target(x.device)
    return runtime.sm_count(x.device) * resident(config, x.dtype.itemsize, target)


# --------------------------------------------------------------------------- entry


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides (n, z, y, x) in vectors of x (N, C, *spatial); 0 where there is one pixel."""
    strides = [s if n > 1 else 0 for s, n in zip(x.stride(), x.shape)]
    missing = [0] * (AXES + 2 - x.dim())
    return tuple(s // vector(x.dtype) for s in (strides[0], *missing, *strides[2:]))


def _product(
    x: Tensor, geometry: ConvGeometry, work: Work, config: Config, index64: bool
) -> Launch:
    """Of the work's items. x: in rows, their room included."""
    tables = make_tables(work, x.device)
    strides = _strides(x)
    missing = (1,) * (AXES - len(geometry.axes))
    steps = (*missing, *(a.stride for a in geometry.axes))
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return Launch(
        gram_shift_kernel,
        (len(work.items),),
        tables.items,
        tables.boxes,
        x.shape[1] // vector(x.dtype),
        *strides,
        *(step * stride for step, stride in zip(steps, strides[1:])),
        AXES=len(geometry.axes),
        VECTOR=vector(x.dtype),
        BLOCK=work.block,
        BLOCK_K=config.block_k,
        PRECISION=runtime.dot_precision(x.dtype),
        INDEX64=index64 or max(reach, work.workspace) > _MAX_INT,
        UPCAST=runtime.INTERPRET and x.dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@prepared
def shift_gram(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Gram:
    """What ``patch_gram_shift`` does, for inputs that look like x."""
    target = runtime.target(x.device)
    if config is None:
        precision = precision_key(x.dtype)
        config = pinned(KERNEL, precision, sizes(geometry), x.device)
        config = config or choose(geometry.channels, geometry.group_channels, precision, target)
    parallel = programs(x, config) if parallel is None else parallel
    work = shift_work(geometry, config.block_m, config.block_k, parallel)
    steps, rows = to_rows(x, pack)
    product = _product(rows, geometry, work, config, index64)
    reduce = reduction(work, make_tables(work, x.device), geometry.samples, index64)
    shape = (geometry.groups, geometry.dim, geometry.dim)
    return Gram(steps, (product,), work.workspace, reduce, shape)


def patch_gram_shift(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Tensor:
    """S (groups, D, D) in float32 of x (N, C, *spatial). At least one axis and one sample.

    Args:
        config: a square tile; chosen by the number of channels if not given.
        parallel: programs assumed to run at the same time, if the device's own number is not meant.
        index64: forces 64-bit addresses; they are used anyway where 32 bits might not do.
    """
    return shift_gram(x, geometry, config, parallel, index64)(x)


# --------------------------------------------------------------------------- what is shipped

_PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "tf32": "fp32", "ieee": "fp32"}


def cases(target: int) -> list[KernelCase]:
    """Every configuration for one to three axes, and one of each precision with 64-bit addresses."""
    found = []
    for precision, element in _PRECISIONS.items():
        shipped = configs(KERNEL, precision, target)
        variants = [(c, axes, False) for c in shipped for axes in (2, 1, 3)]
        variants.append((shipped[0], 2, True))
        for config, axes, wide in variants:
            signature = {"x": f"*{element}", "workspace": "*fp32", "items": "*i32", "boxes": "*i32"}
            signature |= dict.fromkeys(("channels", *_STRIDES), "i64" if wide else "i32")
            constexprs = {
                "AXES": axes,
                "VECTOR": 4 if element == "fp32" else 8,
                "BLOCK": config.block_m,
                "BLOCK_K": config.block_k,
                "PRECISION": "tf32" if precision == "tf32" else "ieee",
                "INDEX64": wide,
                "UPCAST": False,
            }
            found.append(
                KernelCase(
                    name=f"gram_shift[{precision}, {config.text}, {axes}d{', int64' * wide}]",
                    kernel=gram_shift_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    tensor_cores=precision != "ieee" and config.block_m >= 64,
                )
            )
    return found
