"""The second moment by csrc's matrix kernels: which kernel, which tile, which arguments.

``gram_shift`` computes the main boxes of a stride-1 convolution and ``gram_box`` all others; of a
strided or pointwise one ``gram_box`` computes all. ``gram_direct`` gathers patches (few channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ..triton.work import MAX_PIXELS, Work, direct_program, make_tables, make_work, tile_pairs
from ..triton.work import shift_work as box_work
from . import library
from .arguments import dtype_number, four
from .pack import pack, rows_of_channels
from .reduce import reduce
from .shift_plan import BLOCKS as SHIFT_BLOCKS
from .shift_plan import ShiftPlan, make_shift_tables, shift_plan

BLOCKS = (16, 32, 64, 128)  # sides of a tile, of gram_box and gram_direct
_STEP = 32  # pixels
# GUESSES, not measured: what a tile costs per element of the block, against the largest, and blocks
# of threads that fit on a multiprocessor.
_COST = {128: 1.0, 64: 1.25, 32: 2.0, 16: 4.0}
_RESIDENT = 2


def supported(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the kernels cover this input: its dtype, and 32-bit numbers of pixels and patches."""
    pixels = geometry.input_numel // geometry.channels
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and (
        max(pixels, geometry.samples) <= MAX_PIXELS
    )


def choose_block(channels: int, group_channels: int, blocks: tuple[int, ...]) -> int:
    """The tile that wastes least."""

    def cost(block: int) -> float:
        return len(tile_pairs(channels, group_channels, block)) * block**2 * _COST[block]

    return min(blocks, key=cost)


def _parallel(x: Tensor) -> int:
    return _RESIDENT * library.multiprocessors(x.device)


def _workspace(x: Tensor, work: Work) -> Tensor:
    return torch.empty(work.workspace, dtype=torch.float32, device=x.device)


def _launch_boxes(x: Tensor, geometry: ConvGeometry, work: Work, workspace: Tensor) -> None:
    """x: rows of channels."""
    if not work.items:
        return
    tables = make_tables(work, x.device)
    _, strides = four(x)
    library.launch(
        "gram_box",
        x=x,
        workspace=workspace,
        items=tables.items,
        boxes=tables.boxes,
        # a dimension of one pixel may have any stride
        stride_n=strides[0] if geometry.batch > 1 else 0,
        stride=[s if n > 1 else 0 for s, n in zip(strides[1:], four(x)[0][1:])],
        step=[1] * (3 - len(geometry.axes)) + [a.stride for a in geometry.axes],
        channels=x.shape[1],
        item_count=len(work.items),
        block=work.block,
        dtype=dtype_number(x.dtype, product=True),
    )


def _as_rows(x: Tensor) -> Tensor | None:
    """x (N, C, *spatial) as (pixels, C) without a copy; None if its pixels are not evenly spaced."""
    try:
        return x.movedim(1, -1).view(-1, x.shape[1])
    except RuntimeError:
        return None


def _launch_shifts(x: Tensor, plan: ShiftPlan, workspace: Tensor) -> None:
    """x: rows of channels with nothing between the pixels."""
    tables = make_shift_tables(plan, x.device)
    rows = _as_rows(x)
    library.launch(
        "gram_shift",
        x=x,
        workspace=workspace,
        items=tables.items,
        shifts=tables.shifts,
        masks=tables.masks,
        pixels=rows.shape[0],
        row_stride=rows.stride(0) if rows.shape[0] > 1 else x.shape[1],
        channels=x.shape[1],
        size=four(x)[0][1:],
        halo=plan.halo,
        item_count=len(plan.items),
        block=plan.work.block,
        dtype=dtype_number(x.dtype, product=True),
    )


def patch_gram_shift(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Tensor:
    """S (groups, D, D) by products of shifted pixels. At least one axis and one sample."""
    x = rows_of_channels(x)
    if _as_rows(x) is None:
        x = pack(x)
    block = block or choose_block(geometry.channels, geometry.group_channels, SHIFT_BLOCKS)
    plan = shift_plan(geometry, block, x.element_size(), _STEP, _parallel(x))
    if plan is None:
        return patch_gram_box(x, geometry)
    workspace = _workspace(x, plan.work)
    _launch_shifts(x, plan, workspace)
    _launch_boxes(x, geometry, plan.work, workspace)
    return reduce(workspace, plan.work, make_tables(plan.work, x.device), geometry.samples)


def patch_gram_box(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Tensor:
    """S (groups, D, D), all boxes by one kernel: any stride, and 1x1 or no kernel as X^T X."""
    if not geometry.axes:
        x = x.reshape(-1, x.shape[-1])
    x = rows_of_channels(x)
    block = block or choose_block(geometry.channels, geometry.group_channels, BLOCKS)
    work = box_work(geometry, block, _STEP, _parallel(x))
    workspace = _workspace(x, work)
    _launch_boxes(x, geometry, work, workspace)
    return reduce(workspace, work, make_tables(work, x.device), geometry.samples)


def patch_gram_direct(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Tensor:
    """S (groups, D, D) by gathered patches, for x of any strides. At least one axis."""
    columns = geometry.groups * geometry.dim
    block = block or choose_block(columns, geometry.dim, BLOCKS)
    program = direct_program(geometry.samples)
    work = make_work(program, 1, columns, geometry.dim, block, _STEP, _parallel(x))
    tables = make_tables(work, x.device)
    workspace = _workspace(x, work)
    sizes, strides = four(x)
    absent = [1] * (3 - len(geometry.axes))
    library.launch(
        "gram_direct",
        x=x,
        workspace=workspace,
        items=tables.items,
        stride_n=strides[0],
        stride_c=x.stride(1),
        stride=strides[1:],
        size=sizes[1:],
        output=absent + [a.output for a in geometry.axes],
        kernel=absent + [a.kernel for a in geometry.axes],
        conv_stride=absent + [a.stride for a in geometry.axes],
        padding=[0] * len(absent) + [a.padding for a in geometry.axes],
        dilation=absent + [a.dilation for a in geometry.axes],
        columns=columns,
        item_count=len(work.items),
        block=work.block,
        dtype=dtype_number(x.dtype, product=True),
    )
    return reduce(workspace, work, tables, geometry.samples)
