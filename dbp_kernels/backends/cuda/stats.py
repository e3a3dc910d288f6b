"""C and V in one kernel, for patches short enough for shared memory: csrc/kernels/stats.cuh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.cuda.arguments import dtype_number, four
from dbp_kernels.backends.prepared import prepared
from dbp_kernels.planning.geometry import ConvGeometry

MAX_DIM = 128
_MAX_SAMPLES = 2**31 - 129
_MAX_GROUPS = 2**16 - 1  # lines of a grid


def supported(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the kernel covers this input. All its arithmetic is ieee float32."""
    return (
        geometry.dim <= MAX_DIM
        and geometry.samples <= _MAX_SAMPLES
        and geometry.groups <= _MAX_GROUPS
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def splits(geometry: ConvGeometry, multiprocessors: int) -> int:
    """Blocks that share a group's samples: two per multiprocessor, none without samples."""
    chunk = 64 if geometry.dim <= 32 else 32 if geometry.dim <= 64 else 16
    wanted = -(-2 * multiprocessors // geometry.groups)
    return max(1, min(wanted, -(-geometry.samples // chunk)))


@prepared
def _launch(x: Tensor, geometry: ConvGeometry) -> tuple[Callable[..., None], int]:
    """The launch without its tensors, and into how many parts it splits the samples."""
    absent = [1] * (3 - len(geometry.axes))
    sizes, strides = four(x)
    parts = splits(geometry, library.multiprocessors(x.device))
    launch = partial(
        library.launch,
        "stats",
        dtype=dtype_number(x.dtype),
        image_stride=strides[0],
        channel_stride=x.stride(1),
        pixel_stride=strides[1:],
        images=geometry.batch,
        size=sizes[1:],
        output=absent + [a.output for a in geometry.axes],
        kernel=absent + [a.kernel for a in geometry.axes],
        stride=absent + [a.stride for a in geometry.axes],
        padding=[0] * len(absent) + [a.padding for a in geometry.axes],
        dilation=absent + [a.dilation for a in geometry.axes],
        groups=geometry.groups,
        group_channels=geometry.group_channels,
        splits=parts,
    )
    return launch, parts


def decor_stats(x: Tensor, R: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """C (groups, D, D) with zero diagonal and V (groups, D); R in float32. At least one sample."""
    if not geometry.axes:
        x = x.reshape(-1, x.shape[-1])
    groups, dim = geometry.groups, geometry.dim
    launch, parts = _launch(x, geometry)
    C, V = R.new_empty(groups, dim, dim), R.new_empty(groups, dim)
    workspace = R.new_empty(groups * parts, dim, dim)
    launch(x=x, r=R.contiguous(), workspace=workspace, c=C, v=V)
    return C, V
