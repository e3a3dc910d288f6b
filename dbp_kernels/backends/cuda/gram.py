"""The second moment by csrc's matrix kernels: which kernel, which tile, which arguments.

``gram_shift`` computes the main boxes of a stride-1 convolution and ``gram_box`` all others; of a
strided or pointwise one ``gram_box`` computes all. ``gram_direct`` gathers patches (few channels).
``gram_shift_sm90`` and ``gram_matrix_sm90`` are for bf16 and fp16 on compute capability 9.0; the planner
does not offer them before they have been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ..triton.work import (
    MAX_PIXELS,
    Work,
    direct_program,
    keep_if_captured,
    make_tables,
    make_work,
    tile_pairs,
)
from ..triton.work import shift_work as box_work
from . import library
from .arguments import dtype_number, four
from .pack import pack, rows_of_channels
from .reduce import reduce
from .shift_plan import BLOCKS as SHIFT_BLOCKS
from .shift_plan import ShiftPlan, make_shift_tables, shift_plan

BLOCKS = (16, 32, 64, 128)  # sides of a tile, of gram_box and gram_direct
_STEP = 32  # pixels
_SM90_SHARED = 227 << 10  # bytes
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
        slots=work.slots,
        box_count=len(work.program.boxes),
    )


def _as_rows(x: Tensor) -> Tensor | None:
    """x (N, C, *spatial) as (pixels, C) without a copy; None if its pixels are not evenly spaced."""
    try:
        return x.movedim(1, -1).view(-1, x.shape[1])
    except RuntimeError:
        return None


def _row_stride(rows: Tensor) -> int:
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _launch_shifts(kernel: str, x: Tensor, plan: ShiftPlan, workspace: Tensor) -> None:
    """x: rows of channels with nothing between the pixels."""
    tables = keep_if_captured(make_shift_tables(plan, x.device), x.device)
    rows = _as_rows(x)
    library.launch(
        kernel,
        x=x,
        workspace=workspace,
        items=tables.items,
        shifts=tables.shifts,
        masks=tables.masks,
        pixels=rows.shape[0],
        row_stride=_row_stride(rows),
        channels=x.shape[1],
        size=four(x)[0][1:],
        halo=plan.halo,
        item_count=len(plan.items),
        block=plan.work.block,
        dtype=dtype_number(x.dtype, product=True),
        slots=plan.work.slots,
        sets=len(plan.masks),
    )


def _evenly_spaced(x: Tensor) -> Tensor:
    """x as rows of channels with nothing between the pixels; a copy if need be."""
    x = rows_of_channels(x)
    return x if _as_rows(x) is not None else pack(x)


def patch_gram_shift(
    x: Tensor, geometry: ConvGeometry, block: int | None = None, sm90: bool = False
) -> Tensor:
    """S (groups, D, D) by products of shifted pixels. At least one axis and one sample."""
    x = _evenly_spaced(x)
    block = block or choose_block(geometry.channels, geometry.group_channels, SHIFT_BLOCKS)
    if sm90:
        size, limit = 2, _SM90_SHARED
        plan = shift_plan(geometry, 64, size, _STEP, _parallel(x), shared_limit=limit, sm90=True)
    else:
        plan = shift_plan(geometry, block, x.element_size(), _STEP, _parallel(x))
    if plan is None:
        return patch_gram_box(x, geometry)
    workspace = _workspace(x, plan.work)
    _launch_shifts("gram_shift_sm90" if sm90 else "gram_shift", x, plan, workspace)
    _launch_boxes(x, geometry, plan.work, workspace)
    return reduce(workspace, plan.work, make_tables(plan.work, x.device), geometry.samples)


def patch_gram_matrix_sm90(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """S (groups, D, D) of pointwise patches without strides, or of rows, as X^T X."""
    if not geometry.axes:
        x = x.reshape(-1, x.shape[-1])
    x = _evenly_spaced(x)
    rows = _as_rows(x)
    program = direct_program(geometry.samples)
    channels = geometry.channels, geometry.group_channels
    work = make_work(program, 1, *channels, 128, 64, _parallel(x))
    tables = make_tables(work, x.device)
    workspace = _workspace(x, work)
    library.launch(
        "gram_matrix_sm90",
        x=x,
        workspace=workspace,
        items=tables.items,
        rows=rows.shape[0],
        row_stride=_row_stride(rows),
        channels=x.shape[1],
        item_count=len(work.items),
        dtype=dtype_number(x.dtype),
        slots=work.slots,
    )
    return reduce(workspace, work, tables, geometry.samples)


def sm90_problem(x: Tensor, geometry: ConvGeometry) -> str | None:
    """None if the kernels for compute capability 9.0 cover this input, else why not."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"they multiply float16 and bfloat16, not {x.dtype}"
    if any(a.stride != 1 for a in geometry.axes):
        return "they do not cover strided convolutions"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return f"{torch.cuda.get_device_name(x.device)} has another compute capability"
    if x.is_cuda and "9.0a" not in library.build_text():
        return "the library was not built for 9.0a"
    return None


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
        slots=work.slots,
    )
    return reduce(workspace, work, tables, geometry.samples)
