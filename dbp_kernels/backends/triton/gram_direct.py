"""The second moment by implicit im2col, for any geometry: S = Z^T Z / n with Z never in memory.

One program multiplies two tiles of columns of Z over a part of its rows, on or above the diagonal
only; where there are groups, only tiles that meet a block of the diagonal. For few channels (first
layers) and depthwise layers this beats the shift form, which wants whole vectors of channels. A
patch of one pixel (1x1 convolutions, linear layers) is a row of the input: there the shift form has
one box, with vector loads and nothing to gather, and computes it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.backends.triton import gram_shift, runtime
from dbp_kernels.backends.triton.configs import Config, configs, pinned, precision_key
from dbp_kernels.backends.triton.dot import dot
from dbp_kernels.backends.triton.im2col import STRIDES, columns, im2col, patches, pixels
from dbp_kernels.backends.triton.reduce import reduction
from dbp_kernels.backends.triton.runtime import KernelCase, Launch
from dbp_kernels.planning.axis import Axis
from dbp_kernels.planning.boxes import direct_program
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.work import make_work, tile_pairs


@triton.jit(do_not_specialize=("width", *STRIDES))
def gram_direct_kernel(
    x,
    workspace,  # (slots, BLOCK, BLOCK)
    items,  # table, see work.Tables
    table,  # of the geometry, see im2col.py
    width,  # columns of all groups
    stride_n,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AXES: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One item: a partial tile of Z^T Z."""
    item = items + tl.program_id(0) * 6
    m = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    # columns beyond the last repeat it: nothing of them is kept
    i = tl.minimum(tl.load(item + 1) * BLOCK + m, width - 1)
    j = tl.minimum(tl.load(item + 2) * BLOCK + m, width - 1)
    first = tl.load(item + 3)
    last = tl.load(item + 4)
    slot = tl.load(item + 5).to(tl.int64)
    left = columns(i, table, stride_c, stride_z, stride_y, stride_x, AXES, INDEX64)
    right = columns(j, table, stride_c, stride_z, stride_y, stride_x, AXES, INDEX64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for p in range(first, last, BLOCK_K):
        pixel = pixels(p + k, table, stride_n, stride_z, stride_y, stride_x, AXES, INDEX64)
        live = k < last - p
        a = patches(x, pixel, live, left, table, AXES, PADDED, PIXELS_LAST)
        b = patches(x, pixel, live, right, table, AXES, PADDED, PIXELS_LAST)
        acc = dot(a, tl.trans(b), acc, PRECISION, UPCAST)
    tile = workspace + slot * (BLOCK * BLOCK) + m[:, None] * BLOCK + m[None, :]
    tl.store(tile, acc)


KERNEL = "gram_direct"
# What a tile costs per element of S. Addresses take the registers that a tile of 128 would need.
_COST = {64: 1.0, 32: 1.6, 16: 3.2}


def sizes(geometry: ConvGeometry) -> dict[str, int]:
    """What a problem is called when its fastest configuration is measured."""
    return {"dim": geometry.dim, "groups": geometry.groups, "samples": geometry.samples}


@lru_cache(maxsize=1024)
def choose(groups: int, dim: int, precision: str, target: int) -> Config:
    """The configuration whose tiles waste least."""

    def cost(config: Config) -> float:
        block = config.block_m
        return len(tile_pairs(groups * dim, dim, block)) * block**2 * _COST[block]

    return min(configs(KERNEL, precision, target), key=cost)


@prepared
def direct_gram(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Gram:
    """What ``patch_gram_direct`` does, for inputs that look like x."""
    if geometry.pointwise:
        if geometry.axes:
            return gram_shift.shift_gram(x, geometry, config, parallel, index64)
        axis = replace(geometry, axes=(Axis(1, 1, 1, 0, 1),))
        gram = gram_shift.shift_gram(_as_images(x), axis, config, parallel, index64)
        return replace(gram, steps=(_as_images, *gram.steps))
    target = runtime.target(x.device)
    groups, dim = geometry.groups, geometry.dim
    if config is None:
        precision = precision_key(x.dtype)
        config = pinned(KERNEL, precision, sizes(geometry), x.device)
        config = config or choose(groups, dim, precision, target)
    parallel = gram_shift.programs(x, config) if parallel is None else parallel
    program = direct_program(geometry.positions)
    work = make_work(
        program, geometry.batch, groups * dim, dim, config.block_m, config.block_k, parallel
    )
    tables = make_tables(work, x.device)
    source = im2col(x, geometry)
    product = Launch(
        gram_direct_kernel,
        (len(work.items),),
        tables.items,
        source.table,
        groups * dim,
        *source.strides,
        BLOCK=work.block,
        BLOCK_K=config.block_k,
        AXES=source.axes,
        PADDED=source.padded,
        PIXELS_LAST=source.pixels_last,
        PRECISION=runtime.dot_precision(x.dtype),
        INDEX64=index64 or source.wide,
        UPCAST=runtime.INTERPRET and x.dtype == torch.bfloat16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce = reduction(work, tables, geometry.samples, index64)
    return Gram((), (product,), work.workspace, reduce, (groups, dim, dim))


def _as_images(x: Tensor) -> Tensor:
    """Rows as images of one pixel, for kernels that want an axis."""
    return x.reshape(-1, x.shape[-1], 1)


def patch_gram_direct(
    x: Tensor,
    geometry: ConvGeometry,
    config: Config | None = None,
    parallel: int | None = None,
    index64: bool = False,
) -> Tensor:
    """S (groups, D, D) in float32 of x, of any strides. At least one sample.

    Args:
        x: (N, C, *spatial), or (..., C) for a geometry without axes.
        config: a square tile; chosen by the number of columns if not given.
        parallel: programs assumed to run at the same time, if the device's own number is not meant.
        index64: forces 64-bit addresses; they are used anyway where 32 bits might not do.
    """
    return direct_gram(x, geometry, config, parallel, index64)(x)


_PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "tf32": "fp32", "ieee": "fp32"}


def cases(target: int) -> list[KernelCase]:
    """Every configuration in both orders of reading, with the fewest and the most registers."""
    found = []
    for precision, element in _PRECISIONS.items():
        shipped = configs(KERNEL, precision, target)
        both = (True, False)
        variants = [(c, 2, True, last, False) for c in shipped for last in both]
        if precision != "fp16":  # whose code is that of bf16
            variants += [(c, 3, True, True, True) for c in shipped]  # most registers
            variants += [(shipped[0], axes, False, True, False) for axes in (1, 2, 3)]
        for config, axes, padded, last, wide in variants:
            signature = {"x": f"*{element}", "workspace": "*fp32", "items": "*i32", "table": "*i32"}
            signature |= {"width": "i32"} | dict.fromkeys(STRIDES, "i64" if wide else "i32")
            name = f"gram_direct[{precision}, {config.text}, {axes}d{', padded' * padded}"
            name += f"{', pixels last' * last}{', int64' * wide}]"
            constexprs = {
                "BLOCK": config.block_m,
                "BLOCK_K": config.block_k,
                "AXES": axes,
                "PADDED": padded,
                "PIXELS_LAST": last,
                "PRECISION": "tf32" if precision == "tf32" else "ieee",
                "INDEX64": wide,
                "UPCAST": False,
            }
            found.append(
                KernelCase(
                    name=name,
                    kernel=gram_direct_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    tensor_cores=precision != "ieee" and config.block_m >= 64,
                )
            )
    return found
