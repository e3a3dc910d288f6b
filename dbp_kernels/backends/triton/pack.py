"""One pass that lays out any input as rows of channels, in whatever order of pixels.

Rows begin at multiples of 16 bytes and are padded with zero channels to such a multiple: vector
loads, cp.async and TMA need that. The dtype may be converted on the way, and a mean per channel
subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import prepared
from dbp_kernels.backends.rows import empty, vector
from dbp_kernels.backends.triton.runtime import KernelCase, Launch

_MAX_INT = 2**31 - 1
_TILES = ((32, 64), (128, 16))  # (pixels, channels) of one program; the second for few channels
_SIZES = ("size_z", "size_y", "size_x")
_STRIDES = ("x_w", "x_z", "x_y", "x_x", "x_c", "out_w", "out_z", "out_y", "out_x")


@triton.jit(do_not_specialize=(*_SIZES, "channels", "row"))
def pack_kernel(
    x,
    out,
    mean,  # (channels) in float32, or None
    size_z,
    size_y,
    size_x,
    channels,
    row,  # channels of out, in vectors
    x_w,  # strides of x in elements: four dimensions of pixels, then channels
    x_z,
    x_y,
    x_x,
    x_c,
    out_w,  # strides of out in vectors
    out_z,
    out_y,
    out_x,
    VECTOR: tl.constexpr,  # elements of out in 16 bytes
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INDEX64: tl.constexpr,
):
    """A tile of BLOCK_X pixels along one dimension and BLOCK_C channels."""
    tiles = tl.cdiv(size_x, BLOCK_X)
    line = tl.program_id(0) // tiles
    px = (tl.program_id(0) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y = line % size_y
    z = line // size_y % size_z
    w = line // size_y // size_z
    inside = px < size_x
    pixel, channel = px, c
    if INDEX64:
        w, z, y = w.to(tl.int64), z.to(tl.int64), y.to(tl.int64)
        pixel, channel = px.to(tl.int64), c.to(tl.int64)
    at = x + w * x_w + z * x_z + y * x_y
    at = at + (pixel * x_x)[:, None] + (channel * x_c)[None, :]
    value = tl.load(at, mask=inside[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
    if mean is not None:
        value -= tl.load(mean + c, mask=c < channels, other=0.0)[None, :]
    at = out + (w * out_w + z * out_z + y * out_y) * VECTOR
    at = at + (pixel * out_x * VECTOR)[:, None] + c[None, :]
    value = value.to(out.dtype.element_ty)
    tl.store(at, value, mask=inside[:, None] & (c < row * VECTOR)[None, :])


def merged(
    sizes: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """(size, stride, stride) of the fewest dimensions, the smallest first stride last."""
    dims: list[tuple[int, int, int]] = []
    order = sorted(zip(sizes, left, right), key=lambda d: d[1], reverse=True)
    for size, a, b in order:
        if size == 1:
            continue
        if dims and dims[-1][1:] == (a * size, b * size):
            dims[-1] = (dims[-1][0] * size, a, b)
        else:
            dims.append((size, a, b))
    return dims


def packing(x: Tensor, out: Tensor, index64: bool = False) -> Launch:
    """Copies what looks like x (N, C, *spatial) to what looks like out, zeros to channels out has more.

    To be called with x, out and mean, which is None or (C) and subtracted.

    Args:
        out: (N, C', *spatial) in rows.
        index64: forces 64-bit addresses; they are used anyway where 32 bits might not do.
    """
    return _launch(x, out.dtype, out.shape[1], out.stride(), index64)


def pack_into(out: Tensor, x: Tensor, mean: Tensor | None = None, index64: bool = False) -> None:
    """Copies x (N, C, *spatial) minus ``mean`` (C) to out; see ``packing``."""
    packing(x, out, index64)(x=x, out=out, mean=mean)


@prepared
def _launch(
    x: Tensor, dtype: torch.dtype, channels: int, strides: tuple[int, ...], index64: bool
) -> Launch:
    """To an output of this dtype, these channels and strides."""
    unit = vector(dtype)
    layouts = (x.shape, x.stride()), ((x.shape[0], channels, *x.shape[2:]), strides)
    reach = max(1 + sum((n - 1) * s for n, s in zip(*layout)) for layout in layouts)
    dims = merged(*(d[:1] + d[2:] for d in (x.shape, x.stride(), strides)))
    dims = [(1, 0, 0)] * (4 - len(dims)) + dims
    sizes, x_strides, out_strides = zip(*dims)
    block_x, block_c = _TILES[0 if channels > 16 else 1]
    return Launch(
        pack_kernel,
        (
            sizes[0] * sizes[1] * sizes[2] * triton.cdiv(sizes[3], block_x),
            triton.cdiv(channels, block_c),
        ),
        *sizes[1:],
        x.shape[1],
        channels // unit,
        *x_strides,
        x.stride(1),
        *(s // unit for s in out_strides),
        VECTOR=unit,
        BLOCK_X=block_x,
        BLOCK_C=block_c,
        INDEX64=index64 or reach > _MAX_INT,
        num_warps=4,
        num_stages=1,
    )


def pack(
    x: Tensor,
    dtype: torch.dtype | None = None,
    mean: Tensor | None = None,
    index64: bool = False,
) -> Tensor:
    """A copy of x (N, C, *spatial) minus ``mean`` in channels-last order, channels padded by zeros."""
    out = empty(x, dtype)
    pack_into(out, x, mean, index64)
    return out


def cases(target: int) -> list[KernelCase]:
    """Copies and conversions of NCHW and channels-last inputs."""
    del target  # nothing here depends on it
    found = []
    for source, result in (
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp32", "fp32"),
        ("fp32", "bf16"),
        ("fp32", "fp16"),
    ):
        for layout, unit in (("nchw", "x_x"), ("channels last", "x_c"), ("any", None)):
            for variant, tile in enumerate(_TILES):
                wide = variant == 1
                signature = {"x": f"*{source}", "out": f"*{result}", "mean": "*fp32"}
                signature |= dict.fromkeys((*_SIZES, "channels", "row"), "i32")
                signature |= dict.fromkeys(_STRIDES, "i64" if wide else "i32")
                constexprs: dict[str, object] = {
                    "VECTOR": 4 if result == "fp32" else 8,
                    "BLOCK_X": tile[0],
                    "BLOCK_C": tile[1],
                    "INDEX64": wide,
                }
                if unit:
                    constexprs[unit] = 1
                    del signature[unit]
                if not wide:
                    constexprs["mean"] = None
                    del signature["mean"]
                name = f"pack[{source} {layout} to {result}, {tile[0]}x{tile[1]}"
                name += ", int64, mean]" if wide else "]"
                divisible = [n for n in _STRIDES if n in signature] if variant == 0 else []
                found.append(
                    KernelCase(name, pack_kernel, signature, constexprs, 4, 1, False, divisible)
                )
    return found
