"""The second moment by csrc's matrix kernels: which kernel, which tile, which arguments.

``gram_shift`` computes the main boxes of a stride-1 convolution and ``gram_box`` all others; of a
strided or pointwise one ``gram_box`` computes all. ``gram_direct`` gathers patches (few channels).
``gram_shift_sm90`` and ``gram_matrix_sm90`` are for bf16 and fp16 without strides, on compute
capability 9.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.cuda.arguments import dtype_number, four
from dbp_kernels.backends.cuda.pack import pack
from dbp_kernels.backends.cuda.reduce import reduction
from dbp_kernels.backends.cuda.shift_plan import BLOCKS as SHIFT_BLOCKS
from dbp_kernels.backends.cuda.shift_plan import ShiftPlan, make_shift_tables, shift_plan
from dbp_kernels.backends.prepared import Gram, prepared
from dbp_kernels.backends.rows import empty, to_rows
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.planning.boxes import direct_program
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.work import Work, make_work, tile_pairs
from dbp_kernels.planning.work import shift_work as box_work

BLOCKS = (16, 32, 64, 128)  # sides of a tile, of gram_box and gram_direct
_STEP = 32  # pixels
_SM90_SHARED = 227 << 10  # bytes
# GUESSES, not measured: what a tile costs per element of the block, against the largest, and blocks
# of threads that fit on a multiprocessor.
_COST = {128: 1.0, 64: 1.25, 32: 2.0, 16: 4.0}
_RESIDENT = 2


@lru_cache(maxsize=1024)
def choose_block(channels: int, group_channels: int, blocks: tuple[int, ...]) -> int:
    """The tile that wastes least."""

    def cost(block: int) -> float:
        return len(tile_pairs(channels, group_channels, block)) * block**2 * _COST[block]

    return min(blocks, key=cost)


def _parallel(x: Tensor) -> int:
    return _RESIDENT * library.multiprocessors(x.device)


def sm90_problem(x: Tensor, geometry: ConvGeometry) -> str | None:
    """None if the kernels for compute capability 9.0 cover this input, else why not."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"they multiply float16 and bfloat16, not {x.dtype}"
    if any(a.stride != 1 for a in geometry.axes):
        return "they do not cover strided convolutions"
    return library.sm90_problem(x.device) if x.is_cuda else None  # emulated


# --------------------------------------------------------------------------- the input


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as_rows(x: Tensor) -> Tensor | None:
    """x (N, C, *spatial) as (pixels, C) without a copy.

    None if its pixels are not evenly spaced, or share memory (expanded, or windows that overlap).
    """
    try:
        rows = x.movedim(1, -1).view(-1, x.shape[1])
    except RuntimeError:
        return None
    return rows if _row_stride(rows) >= rows.shape[1] else None


def _row_stride(rows: Tensor) -> int:
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _rows_of_channels(
    x: Tensor, geometry: ConvGeometry, even: bool = False
) -> tuple[tuple[Callable[[Tensor], Tensor], ...], Tensor]:
    """How x becomes rows of channels, with nothing between the pixels if ``even``; the result's form."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if not geometry.axes and x.dim() != 2:
        steps.append(_as_matrix)
        x = _as_matrix(x)
    more, rows = to_rows(x, pack)
    if even and _as_rows(rows) is None:
        more, rows = (pack,), empty(x)
    return (*steps, *more), rows


# --------------------------------------------------------------------------- launches


def _gram(
    steps: tuple[Callable[[Tensor], Tensor], ...],
    products: tuple[Callable[..., None], ...],
    work: Work,
    geometry: ConvGeometry,
    device: torch.device,
) -> Gram:
    shape = (geometry.groups, geometry.dim, geometry.dim)
    reduce = reduction(work, make_tables(work, device), geometry.samples)
    return Gram(steps, products, work.workspace, reduce, shape)


def _boxes(x: Tensor, geometry: ConvGeometry, work: Work) -> tuple[Callable[..., None], ...]:
    """The launch of the work's items, if there are any. x: rows of channels."""
    if not work.items:
        return ()
    tables = make_tables(work, x.device)
    sizes, strides = four(x)
    launch = partial(
        library.launch,
        "gram_box",
        items=tables.items,
        boxes=tables.boxes,
        # a dimension of one pixel may have any stride
        stride_n=strides[0] if geometry.batch > 1 else 0,
        stride=[s if n > 1 else 0 for s, n in zip(strides[1:], sizes[1:])],
        step=[1] * (3 - len(geometry.axes)) + [a.stride for a in geometry.axes],
        channels=x.shape[1],
        item_count=len(work.items),
        block=work.block,
        dtype=dtype_number(x.dtype, product=True),
        slots=work.slots,
        box_count=len(work.program.boxes),
    )
    return (launch,)


def _shifts(kernel: str, x: Tensor, plan: ShiftPlan) -> Callable[..., None]:
    """The launch of the plan's items. x: rows of channels with nothing between the pixels."""
    tables = make_shift_tables(plan, x.device)
    rows = _as_rows(x)
    assert rows is not None  # see ``_rows_of_channels``
    return partial(
        library.launch,
        kernel,
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


# --------------------------------------------------------------------------- forms


@prepared
def shift_gram(
    x: Tensor, geometry: ConvGeometry, block: int | None = None, sm90: bool = False
) -> Gram:
    """By products of shifted pixels. At least one axis and one sample."""
    steps, rows = _rows_of_channels(x, geometry, even=True)
    if sm90:
        size, limit = 2, _SM90_SHARED
        plan = shift_plan(geometry, 64, size, _STEP, _parallel(x), shared_limit=limit, sm90=True)
    else:
        block = block or choose_block(geometry.channels, geometry.group_channels, SHIFT_BLOCKS)
        plan = shift_plan(geometry, block, x.element_size(), _STEP, _parallel(x))
    if plan is None:
        return box_gram(x, geometry)
    kernel = "gram_shift_sm90" if sm90 else "gram_shift"
    products = (_shifts(kernel, rows, plan), *_boxes(rows, geometry, plan.work))
    return _gram(steps, products, plan.work, geometry, x.device)


@prepared
def matrix_gram_sm90(x: Tensor, geometry: ConvGeometry) -> Gram:
    """Of pointwise patches without strides, or of rows, as X^T X."""
    steps, x = _rows_of_channels(x, geometry, even=True)
    rows = _as_rows(x)
    assert rows is not None  # see ``_rows_of_channels``
    program = direct_program(geometry.samples)
    channels = geometry.channels, geometry.group_channels
    work = make_work(program, 1, *channels, 128, 64, _parallel(x))
    launch = partial(
        library.launch,
        "gram_matrix_sm90",
        items=make_tables(work, x.device).items,
        rows=rows.shape[0],
        row_stride=_row_stride(rows),
        channels=x.shape[1],
        item_count=len(work.items),
        dtype=dtype_number(x.dtype),
        slots=work.slots,
    )
    return _gram(steps, (launch,), work, geometry, x.device)


@prepared
def box_gram(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Gram:
    """All boxes by one kernel: any stride, and 1x1 or no kernel as X^T X."""
    steps, x = _rows_of_channels(x, geometry)
    block = block or choose_block(geometry.channels, geometry.group_channels, BLOCKS)
    work = box_work(geometry, block, _STEP, _parallel(x))
    return _gram(steps, _boxes(x, geometry, work), work, geometry, x.device)


@prepared
def direct_gram(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Gram:
    """By gathered patches, for x of any strides. At least one axis."""
    columns = geometry.groups * geometry.dim
    block = block or choose_block(columns, geometry.dim, BLOCKS)
    program = direct_program(geometry.samples)
    work = make_work(program, 1, columns, geometry.dim, block, _STEP, _parallel(x))
    sizes, strides = four(x)
    absent = [1] * (3 - len(geometry.axes))
    launch = partial(
        library.launch,
        "gram_direct",
        items=make_tables(work, x.device).items,
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
    return _gram((), (launch,), work, geometry, x.device)


def patch_gram_shift(
    x: Tensor, geometry: ConvGeometry, block: int | None = None, sm90: bool = False
) -> Tensor:
    """S (groups, D, D) by ``shift_gram``."""
    return shift_gram(x, geometry, block, sm90)(x)


def patch_gram_box(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Tensor:
    """S (groups, D, D) by ``box_gram``."""
    return box_gram(x, geometry, block)(x)


def patch_gram_direct(x: Tensor, geometry: ConvGeometry, block: int | None = None) -> Tensor:
    """S (groups, D, D) by ``direct_gram``."""
    return direct_gram(x, geometry, block)(x)


def patch_gram_matrix_sm90(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """S (groups, D, D) by ``matrix_gram_sm90``."""
    return matrix_gram_sm90(x, geometry)(x)
