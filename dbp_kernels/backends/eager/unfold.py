"""Plain im2col: the patches as rows, and their second moment a few images at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.layout import images_per_chunk, panels
from dbp_kernels.precision import product_dtype, statistics_dtype
from dbp_kernels.products.matmul import divide_upper, mirror, upper_product

# Patches per image from which on one product per image beats packing all images into rows.
_MANY = 512
# Strided patches are copied in runs of taps from so many in a run on; the product with what lies in
# memory like that is slower where patches are longer than this.
_RUN, _LONG_PATCH = 16, 512


def windows(x: Tensor, geometry: ConvGeometry, axes: tuple[int, ...]) -> Tensor:
    """A view of x (N, C, *spatial) with each of ``axes`` replaced by its output positions.

    The taps of those axes are appended as last dimensions, in order. Copies only to pad.
    """
    pads = [0] * (2 * len(geometry.axes))
    for axis in axes:
        pads[-2 * axis - 2] = pads[-2 * axis - 1] = geometry.axes[axis].padding
    if any(pads):
        x = F.pad(x, pads)
    for axis in axes:
        a = geometry.axes[axis]
        x = x.unfold(2 + axis, a.span, a.stride)[..., :: a.dilation]
    return x


def channels_first(
    sizes: list[int], first_channel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uninitialised (groups, *pixels, *channels), whose channels lie before the pixels in memory.

    ``first_channel`` is the first of the channels' axes. Filled from a map with its pixels
    innermost, it takes runs of them, and nothing is transposed.
    """
    group, pixels, channels = sizes[0], sizes[1:first_channel], sizes[first_channel:]
    buffer = torch.empty([group, *channels, *pixels], dtype=dtype, device=device)
    pixel = 1 + len(channels)
    return buffer.permute(0, *range(pixel, buffer.dim()), *range(1, pixel))


def rows(x: Tensor, geometry: ConvGeometry, dtype: torch.dtype | None = None) -> Tensor:
    """The patches Z (groups, n, D) of x; in memory n may come last, see ``channels_first``."""
    dtype = dtype or statistics_dtype(x.dtype)
    g, dims = geometry.groups, len(geometry.axes)
    if dims == 0:
        x = x.reshape(-1, g, geometry.group_channels).transpose(0, 1)
        return x if x.dtype == dtype else x.to(dtype)
    # patches that are pixels: few of them, or side by side already
    if geometry.pointwise and (geometry.strided or x.stride(1) == 1):
        strides = (slice(None, None, a.stride) for a in geometry.axes)
        every: tuple[slice, ...] = (slice(None), slice(None), *strides)
        x = x[every]
        x = x.to(dtype).movedim(1, -1).reshape(-1, g, geometry.group_channels)
        return x.transpose(0, 1)
    z = windows(x, geometry, tuple(range(dims)))
    z = z.unflatten(1, (g, geometry.group_channels))
    z = z.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    if x.is_cuda or _in_runs(x, geometry):
        out = torch.empty(z.shape, dtype=dtype, device=x.device)
    else:
        out = channels_first(list(z.shape), 2 + dims, dtype, x.device)
    return out.copy_(z).flatten(2 + dims).flatten(1, -2)


def _in_runs(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether copying runs of taps beats copying runs of pixels, of which a stride leaves none."""
    last = geometry.axes[-1]
    taps = last.kernel if last.dilation == 1 and x.stride(-1) == 1 else 1
    return last.stride > 1 and taps >= _RUN and geometry.dim <= _LONG_PATCH


def chunks(
    x: Tensor, geometry: ConvGeometry, expansion: float, inputs: float
) -> list[tuple[Tensor, ConvGeometry]]:
    """x split over images, as many at a time as ``images_per_chunk`` says."""
    size = images_per_chunk(geometry, expansion, inputs, x.device.type)
    if size >= geometry.batch:
        return [(x, geometry)]
    return [(part, geometry.with_batch(part.shape[0])) for part in x.split(size)]


def patch_gram_unfold(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """S (groups, D, D) by im2col and a symmetric product; see ``ops.patch_gram``."""
    dtype = statistics_dtype(x.dtype)
    n = geometry.samples
    count = panels(geometry.dim, n, x.is_cuda)
    # libraries scale an operand, not the sum: exact where n is a power of two, and so quicker
    exact = n & (n - 1) == 0
    mean = 1 / n if exact else 1.0
    few = geometry.groups == 1 and n <= geometry.dim
    if few and not geometry.axes and count == 1 and x.dtype == dtype:
        Z = x.reshape(-1, geometry.dim)  # one call: a small linear layer notices every other
        S = torch.addmm(Z.new_empty(()), Z.T, Z, beta=0, alpha=mean).unsqueeze(0)
        return S if exact else S.div_(n)
    out = torch.empty(geometry.groups, geometry.dim, geometry.dim, dtype=dtype, device=x.device)
    many_pixels = len(geometry.axes) and geometry.positions >= max(_MANY, 4 * geometry.dim)
    if geometry.pointwise and many_pixels and not (x.is_cuda or geometry.strided):
        _sum_over_images(x, geometry, out, count, mean)
    elif geometry.pointwise:
        Z = rows(x, geometry, product_dtype(x))
        upper_product(Z, Z, out, False, count, mean)
    else:
        for i, (part, g) in enumerate(chunks(x, geometry, geometry.expansion, 1)):
            Z = rows(part, g, product_dtype(x))
            upper_product(Z, Z, out, i > 0, count, mean)
            del Z  # the next part takes the same memory
    if not exact:
        divide_upper(out, count, n)
    mirror(out, count)
    return out


def _sum_over_images(
    x: Tensor, geometry: ConvGeometry, out: Tensor, count: int, mean: float
) -> None:
    """One product per image: many pixels to an image make packing into rows not worth its copy."""
    for i, image in enumerate(x):
        pixels = image.to(out.dtype).reshape(geometry.groups, geometry.group_channels, -1)
        upper_product(pixels.mT, pixels.mT, out, i > 0, count, mean)
