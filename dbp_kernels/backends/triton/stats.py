"""C, V and the loss in one pass over the input, for patches small enough to stay on the chip.

A program decorrelates a few pixels at a time, X = Z R^T, and adds X^T X to an accumulator it keeps
in registers; neither the patches nor X are ever in memory. Programs split the pixels; a second
kernel sums their partial matrices in a fixed order. Costs 4 n D^2, so it is for small D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import prepared
from dbp_kernels.backends.triton.configs import Config, configs, pinned
from dbp_kernels.backends.triton.dot import round_tf32
from dbp_kernels.backends.triton.gram_direct import sizes
from dbp_kernels.backends.triton.im2col import STRIDES, columns, im2col, patches, pixels, readable
from dbp_kernels.backends.triton.runtime import KernelCase, Launch, dot_precision, sm_count, target
from dbp_kernels.backends.triton.update import upper_tile
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.rules import UpdateRule


@triton.jit(do_not_specialize=STRIDES)
def decor_stats_kernel(
    x,
    R,  # (groups, D, D)
    workspace,  # (groups, parts, BLOCK, BLOCK)
    table,
    stride_n,
    stride_c,
    stride_z,
    stride_y,
    stride_x,
    D,
    samples,
    parts,
    length,  # pixels of one part
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AXES: tl.constexpr,
    PADDED: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
):
    """X^T X over one part of the pixels, of one group; X^T = R Z^T, so that both products have D rows."""
    group = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * length
    last = tl.minimum(samples, first + length)
    d = tl.arange(0, BLOCK)
    # columns beyond D repeat the last one; R's zeros keep them out of X
    q = group * D + tl.minimum(d, D - 1)
    column = columns(q, table, stride_c, stride_z, stride_y, stride_x, AXES, INDEX64)
    at = R + group.to(tl.int64) * D * D + d[:, None] * D + d[None, :]
    r = tl.load(at, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
    if PRECISION == "tf32":
        r = round_tf32(r)
    k = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for p in range(first, last, BLOCK_P):
        pixel = pixels(p + k, table, stride_n, stride_z, stride_y, stride_x, AXES, INDEX64)
        z = patches(x, pixel, k < last - p, column, table, AXES, PADDED, PIXELS_LAST)
        z = z.to(tl.float32)
        if PRECISION == "tf32":
            z = round_tf32(z)
        y = tl.dot(r, z, input_precision=PRECISION)
        if PRECISION == "tf32":
            y = round_tf32(y)
        acc = tl.dot(y, tl.trans(y), acc, input_precision=PRECISION)
    out = workspace + tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(out + d[:, None] * BLOCK + d[None, :], acc)


@triton.jit
def decor_stats_reduce_kernel(
    workspace,  # (groups, parts, BLOCK, BLOCK)
    C,  # (groups, D, D)
    V,  # (groups, D)
    loss,  # (groups, squares)
    D,
    parts,
    side,  # squares along D
    scale,
    c_loss,
    v_loss,
    BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """One square of C on or above the diagonal and its mirror image."""
    squares = side * (side + 1) // 2
    group = (tl.program_id(0) // squares).to(tl.int64)
    row, column = upper_tile(tl.program_id(0) % squares, side)
    i = (row * SQUARE + tl.arange(0, SQUARE))[:, None]
    j = (column * SQUARE + tl.arange(0, SQUARE))[None, :]
    # only the upper triangle is read, so that C is exactly symmetric
    at = workspace + group * parts * (BLOCK * BLOCK) + tl.minimum(i, j) * BLOCK + tl.maximum(i, j)
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for _ in range(parts):
        total += tl.load(at)
        at += BLOCK * BLOCK
    total *= scale

    diagonal = i == j
    inside = (i < D) & (j < D)
    v = total - 1.0
    c = tl.where(diagonal, 0.0, total)
    out = C + group * D * D
    tl.store(out + i * D + j, c, mask=inside)
    if row != column:
        tl.store(out + j * D + i, c, mask=inside)
    tl.store(V + group * D + i + 0 * j, v, mask=inside & diagonal)
    twice = tl.where(row == column, 1.0, 2.0)  # a square off the diagonal stands for two
    terms = tl.where(diagonal, v_loss * v * v, twice * c_loss * total * total)
    tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, terms, 0.0)))


KERNEL = "decor_stats"
SQUARE = 16
_SHORTEST = 8  # steps of a part: a shorter one costs more in partial sums than it saves


def fits(geometry: ConvGeometry, capability: int, precision: str) -> bool:
    """Whether there is a configuration for this D (precision "ieee" or "tf32")."""
    largest = configs(KERNEL, precision, capability)[0].block_m
    return 0 < geometry.dim <= largest and geometry.samples > 0 and readable(geometry)


def choose_config(geometry: ConvGeometry, precision: str, device: torch.device) -> Config:
    """The measured best, else the smallest accumulator that holds D x D."""
    dim, capability = geometry.dim, target(device)
    fit = [c for c in configs(KERNEL, precision, capability) if c.block_m >= dim]
    if not fit:
        raise ValueError(
            f"D={dim} is too large for the fused kernel on compute capability {capability}"
        )
    best = pinned(KERNEL, precision, sizes(geometry), device)
    return best if best in fit else min(fit, key=lambda c: c.block_m)


class _Launches(NamedTuple):
    """Both launches, and what they need: parts of the samples, side of a partial matrix, squares."""

    partials: Launch
    reduce: Launch
    parts: int
    block: int
    squares: int


@prepared
def _launches(
    x: Tensor, geometry: ConvGeometry, rule: UpdateRule, config: Config | None, index64: bool
) -> _Launches:
    precision = dot_precision(torch.float32)
    config = config or choose_config(geometry, precision, x.device)
    source = im2col(x, geometry)
    block, step = config.block_m, config.block_k
    groups, dim, samples = geometry.groups, geometry.dim, geometry.samples
    parts = max(1, min(2 * sm_count(x.device) // groups, samples // (_SHORTEST * step)))
    length = triton.cdiv(samples, parts * step) * step
    parts = triton.cdiv(samples, length)
    partials = Launch(
        decor_stats_kernel,
        (groups * parts,),
        source.table,
        *source.strides,
        dim,
        samples,
        parts,
        length,
        BLOCK=block,
        BLOCK_P=step,
        AXES=source.axes,
        PADDED=source.padded,
        PIXELS_LAST=source.pixels_last,
        PRECISION=precision,
        INDEX64=index64 or source.wide,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    side = triton.cdiv(dim, SQUARE)
    squares = side * (side + 1) // 2
    reduce = Launch(
        decor_stats_reduce_kernel,
        (groups * squares,),
        dim,
        parts,
        side,
        1 / samples,
        rule.c_weight / rule.loss_scale,
        rule.kappa / rule.loss_scale,
        BLOCK=block,
        SQUARE=SQUARE,
        num_warps=1,
        num_stages=3,
    )
    return _Launches(partials, reduce, parts, block, squares)


def decor_stats(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    rule: UpdateRule | None = None,
    config: Config | None = None,
    index64: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal, V (groups, D) and the loss (groups,), all float32.

    x of any strides in float16, bfloat16 or float32, R (groups, D, D) float32. The loss is that of
    ``rule`` (standard, kappa = 0.5, if none is given).
    """
    groups, dim = geometry.groups, geometry.dim
    rule = rule or UpdateRule.make("standard", 0.5, dim)
    if not geometry.axes:
        x = x.reshape(-1, geometry.channels)
    launches = _launches(x, geometry, rule, config, index64)
    workspace = R.new_empty(groups, launches.parts, launches.block, launches.block)
    C, V = R.new_empty(groups, dim, dim), R.new_empty(groups, dim)
    loss = R.new_empty(groups, launches.squares)
    launches.partials(x=x, R=R.contiguous(), workspace=workspace)
    launches.reduce(workspace=workspace, C=C, V=V, loss=loss)
    return C, V, loss.sum(1)


def cases(capability: int) -> list[KernelCase]:
    """Every shipped variant of both kernels for a compute capability."""
    found = []
    blocks = set()
    for precision in ("tf32", "ieee"):
        shipped = configs(KERNEL, precision, capability)
        blocks |= {c.block_m for c in shipped}
        for element in ("bf16", "fp16", "fp32"):
            both = (True, False)
            variants = [(c, 2, True, last, False) for c in shipped for last in both]
            if element != "fp16":  # whose code is that of bf16
                variants += [(c, 3, True, True, True) for c in shipped]  # most registers
                variants += [(shipped[0], axes, False, axes > 0, False) for axes in (0, 1, 3)]
            for c, axes, padded, last, wide in variants:
                signature = {
                    "x": f"*{element}",
                    "R": "*fp32",
                    "workspace": "*fp32",
                    "table": "*i32",
                }
                signature |= dict.fromkeys(STRIDES, "i64" if wide else "i32")
                signature |= dict.fromkeys(("D", "samples", "parts", "length"), "i32")
                constexprs = {
                    "BLOCK": c.block_m,
                    "BLOCK_P": c.block_k,
                    "AXES": axes,
                    "PADDED": padded,
                    "PIXELS_LAST": last,
                    "PRECISION": precision,
                    "INDEX64": wide,
                }
                name = f"decor_stats[{element} {precision}, {c.text}, {axes}d{', padded' * padded}"
                name += f"{', pixels last' * last}{', int64' * wide}]"
                found.append(
                    KernelCase(
                        name=name,
                        kernel=decor_stats_kernel,
                        signature=signature,
                        constexprs=constexprs,
                        num_warps=c.num_warps,
                        num_stages=c.num_stages,
                        tensor_cores=precision == "tf32" and c.block_m >= 64,
                    )
                )
    pointers = dict.fromkeys(("workspace", "C", "V", "loss"), "*fp32")
    integers = dict.fromkeys(("D", "parts", "side"), "i32")
    floats = dict.fromkeys(("scale", "c_loss", "v_loss"), "fp32")
    return found + [
        KernelCase(
            name=f"decor_stats_reduce[{block}]",
            kernel=decor_stats_reduce_kernel,
            signature={**pointers, **integers, **floats},
            constexprs={"BLOCK": block, "SQUARE": SQUARE},
            num_warps=1,
            num_stages=3,
            tensor_cores=False,
        )
        for block in sorted(blocks)
    ]
