"""A rival: a convolution's weight gradient of the input with itself, plus the borders it does not know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.registry import Case
from bench.rivals.dense import product


def why_not(case: Case) -> str:
    if case.is_linear:
        return "not a convolution"
    if case.kernel == (1, 1):
        return "" if case.padding == (0, 0) else "padded 1x1"
    if case.stride != (1, 1):
        return "stride above 1"
    spans = [d * (k - 1) for k, d in zip(case.kernel, case.dilation, strict=True)]
    if any(size <= span for size, span in zip(case.output_size, spans, strict=True)):
        return "no position that all taps share"
    return ""


def _weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], case: Case) -> Tensor:
    """The library's weight gradient, (C, C/groups, kernel): grad and x are already padded."""
    shape = (case.C, case.C // case.groups, *kernel)
    with _cudnn_at_its_best(x):
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            x.new_empty(1).expand(shape),  # only its shape is read
            None,
            [1, 1],
            [0, 0],
            list(case.dilation),
            False,
            [0, 0],
            case.groups,
            [False, True, False],
        )[1]


def _cudnn_at_its_best(x: Tensor) -> AbstractContextManager:
    """cuDNN may try all its algorithms, and obeys the precision that products obey."""
    if not x.is_cuda:
        return nullcontext()
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32
    )


def _packed(x: Tensor) -> Tensor:
    """Contiguous; on CUDA in channels-last order if it is in that order: cuDNN prefers it."""
    format = torch.channels_last if x.is_cuda and x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=format)


def self_wgrad(x: Tensor, case: Case) -> Tensor:
    """A convolution's weight gradient of x with itself, plus the borders it does not know.

    With taps k, k' and e = k' - k >= 0 in rows (S is symmetric), the block S[k, k'] is the sum of
    x(q) x(q + dilation e)^T over the window of positions q that tap k visits. The positions that
    all taps visit, the core, give the weight gradient of one convolution with the core as output
    gradient and a kernel of (KH, 2 KW - 1) shifts. What a tap visits beyond the core is added:
    whole rows first (patches of the two border strips), then the columns left of and right of the
    core, whose sums again depend on e only. Stride 1, any dilation and groups.
    """
    n, groups, per_group = case.n, case.groups, case.C // case.groups
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if case.kernel == (1, 1):
        x = _packed(x[:, :, :: case.stride[0], :: case.stride[1]])
        s = _weight_gradient(x, x, (1, 1), case).to(dtype)
        return s.reshape(groups, per_group, per_group) / n

    kh, kw = case.kernel
    oh, ow = case.output_size
    span_h, span_w = (d * (k - 1) for d, k in zip(case.dilation, case.kernel, strict=True))
    (ph, pw) = case.padding
    padded = F.pad(x, (pw, pw, ph, ph))  # position q of x is q + padding here
    core = _packed(padded[:, :, span_h:oh, span_w:ow])
    lower = _packed(padded[:, :, span_h:])  # row shifts e >= 0 only
    shifts = _weight_gradient(core, lower, (kh, 2 * kw - 1), case).to(dtype)
    shifts = shifts.reshape(groups, per_group, per_group, kh, 2 * kw - 1)
    shifts = shifts.permute(0, 1, 3, 4, 2).contiguous()  # (groups, c, KH, 2 KW - 1, c')

    # Tap-major S, (groups, KH, KW, c, KH, KW, c'); only rows ky' >= ky until they are mirrored.
    out = x.new_empty((groups, kh, kw, per_group, kh, kw, per_group), dtype=dtype)
    columns = _border_columns(lower, case, span_w)
    rows = _border_rows(padded, case, span_h)
    for ky in range(kh):
        for kx in range(kw):
            block = shifts[:, :, : kh - ky, kw - 1 - kx : 2 * kw - 1 - kx]
            if columns:
                block = block + columns[kx][:, :, : kh - ky]
            if rows:
                block = block + rows[ky][:, kx]
            torch.mul(block, 1 / n, out=out[:, ky, kx, :, ky:])
        for below in range(ky + 1, kh):
            out[:, below, :, :, ky] = out[:, ky, :, :, below].permute(0, 3, 4, 1, 2)
    return out.permute(0, 3, 1, 2, 6, 4, 5).reshape(groups, case.D, case.D)


def _border_patches(padded: Tensor, case: Case, axis: int, start: int, count: int) -> Tensor:
    """Patches at output positions start...start+count of ``axis``, all positions of the other axis.

    Returns (groups, count, other axis, N, KH, KW, c), contiguous. ``padded`` holds the positions
    of the other axis that are wanted, and their taps, from 0.
    """
    span = case.dilation[axis] * (case.kernel[axis] - 1)
    strip = padded.narrow(2 + axis, start, count + span)
    strip = strip.unflatten(1, (case.groups, -1))  # (N, groups, c, rows, columns)
    strip = strip.permute(1, 3 + axis, 4 - axis, 0, 2).contiguous()
    other = 1 - axis
    length = strip.shape[2] - case.dilation[other] * (case.kernel[other] - 1)
    taps = []
    for ky in range(case.kernel[0]):
        for kx in range(case.kernel[1]):
            offset = (case.dilation[0] * ky, case.dilation[1] * kx)
            taps.append(strip.narrow(1, offset[axis], count).narrow(2, offset[other], length))
    return torch.stack(taps, 4).unflatten(4, case.kernel)


def _border_parts(padded: Tensor, case: Case, axis: int) -> list[tuple[Tensor, Tensor]]:
    """For every tap k of ``axis``, the patches where it is beyond the core: (before, after) it.

    They are slices of :func:`_border_patches`; positions where tap k sits on padding are left out.
    """
    d, k_size, pad = case.dilation[axis], case.kernel[axis], case.padding[axis]
    size, image = case.output_size[axis], (case.H, case.W)[axis]
    span = d * (k_size - 1)
    before = _border_patches(padded, case, axis, 0, span)
    after = _border_patches(padded, case, axis, size - span, span)
    parts = []
    for k in range(k_size):
        low, high = max(0, pad - d * k), min(size, pad + image - d * k)  # not on padding
        parts.append(
            (
                before[:, low : max(low, min(high, span - d * k))],
                after[:, max(span - d * k, low - size + span) : high - size + span],
            )
        )
    return parts


def _border_columns(lower: Tensor, case: Case, span: int) -> list[Tensor]:
    """For every tap column kx, (groups, c, KH, KW, c'): its border columns over the core rows.

    Entry (e, kx') pairs column kx with the tap in column kx' and e rows below it.
    """
    columns = []
    for kx, parts in enumerate(_border_parts(lower, case, axis=1) if span else ()):
        total = 0
        for patches in parts:  # (groups, columns, rows, N, KH, KW, c)
            left = patches[..., 0, kx, :].flatten(1, 3)
            right = patches.flatten(4).flatten(1, 3)
            total = total + product(left.transpose(1, 2), right)
        columns.append(total.unflatten(2, (*case.kernel, -1)))
    return columns


def _border_rows(padded: Tensor, case: Case, span: int) -> list[Tensor]:
    """For every tap row ky, (groups, KW, c, KH - ky, KW, c'): its border rows, tap rows from ky."""
    kh, kw = case.kernel
    rows = []
    for ky, parts in enumerate(_border_parts(padded, case, axis=0) if span else ()):
        total = 0
        for patches in parts:  # (groups, rows, columns, N, KH, KW, c)
            right = patches[..., ky:, :, :].flatten(4).flatten(1, 3)
            left = patches[..., ky, :, :].flatten(4).flatten(1, 3)
            total = total + product(left.transpose(1, 2), right)
        rows.append(total.unflatten(2, (kh - ky, kw, -1)).unflatten(1, (kw, -1)))
    return rows
