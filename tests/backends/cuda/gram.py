"""Runs the second moment's kernels on numpy arrays, emulated or from compiled PTX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from emulation import DTYPES, decode, encode
from helpers import Case, moment_error

from dbp_kernels import reference
from dbp_kernels.backends.cuda.shift_plan import ShiftPlan, make_shift_tables
from dbp_kernels.backends.tables import make_tables
from dbp_kernels.planning import work as W
from dbp_kernels.planning.geometry import ConvGeometry

CPU = torch.device("cpu")
Run = Callable[..., Any]  # emulation.call, or run_ptx with its header


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """x as the products see it, in float64."""
    if dtype != "tf32":
        return torch.from_numpy(decode(encode(x.numpy(), dtype)))
    bits = x.float().view(torch.int32)  # 10 bits of mantissa, ties away from zero
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def check(S: torch.Tensor, x: torch.Tensor, case: Case, dtype: str) -> None:
    """Products are exact in fp32, so only its sums may err: against the oracle on rounded x."""
    assert moment_error(S, reference.patch_gram(rounded(x, dtype), *case.arguments)) < 1e-5
    assert torch.equal(S, S.mT)


def rows_of_channels(x: torch.Tensor, dtype: str) -> np.ndarray:
    """x (N, C, *spatial) -> (N, z, y, x, C'), as pack.cuh lays it out."""
    unit = 16 // np.dtype(encode(np.zeros(1), dtype).dtype).itemsize
    x = x.reshape(*x.shape[:2], *(1,) * (5 - x.dim()), *x.shape[2:]).movedim(1, -1)
    return encode(torch.nn.functional.pad(x, (0, -x.shape[-1] % unit)).numpy(), dtype)


def poisoned(work: W.Work) -> np.ndarray:
    """The workspace before the kernels write it."""
    return np.full((work.slots, work.block, work.block), np.nan, np.float32)


def reduce(run: Run, workspace: np.ndarray, work: W.Work, samples: int) -> torch.Tensor:
    """S (groups, D, D) from a filled workspace."""
    tables = make_tables(work, CPU)
    dim = work.group_channels * work.program.taps
    out = np.full((work.channels // work.group_channels, dim, dim), np.nan, np.float32)
    run(
        "reduce",
        workspace=workspace,
        out=out,
        tiles=tables.tiles.numpy(),
        taps=tables.taps.numpy(),
        slots=tables.slots.numpy(),
        upper=len(work.upper),
        channels=work.channels,
        group_channels=work.group_channels,
        tap_count=work.program.taps,
        block=work.block,
        straight=work.straight,
        symmetric=work.symmetric,
        symmetric_base=work.symmetric_base,
        entries=work.entries,
        scale=1 / samples,
    )
    return torch.from_numpy(out)


def box_arguments(
    rows: np.ndarray, steps: tuple[int, ...], work: W.Work, dtype: str, workspace: np.ndarray
) -> dict:
    """Arguments of gram_box; ``steps``: the convolution's strides."""
    tables = make_tables(work, CPU)
    strides = [s // rows.itemsize for s in rows.strides]
    return {
        "x": rows,
        "workspace": workspace,
        "items": tables.items.numpy(),
        "boxes": tables.boxes.numpy(),
        "stride_n": strides[0],
        "stride": strides[1:4],
        "step": [1] * (3 - len(steps)) + list(steps),
        "channels": rows.shape[-1],
        "item_count": len(work.items),
        "block": work.block,
        "dtype": DTYPES[dtype],
        "slots": work.slots,
        "box_count": len(work.program.boxes),
    }


def shift_arguments(rows: np.ndarray, plan: ShiftPlan, dtype: str, workspace: np.ndarray) -> dict:
    """Arguments of gram_shift."""
    tables = make_shift_tables(plan, CPU)
    return {
        "x": rows,
        "workspace": workspace,
        "items": tables.items.numpy(),
        "shifts": tables.shifts.numpy(),
        "masks": tables.masks.numpy(),
        "pixels": math.prod(rows.shape[:4]),
        "row_stride": rows.shape[-1],
        "channels": rows.shape[-1],
        "size": list(rows.shape[1:4]),
        "halo": plan.halo,
        "item_count": len(plan.items),
        "block": plan.work.block,
        "dtype": DTYPES[dtype],
        "slots": plan.work.slots,
        "sets": len(plan.masks),
    }


def direct_arguments(
    x: np.ndarray, geometry: ConvGeometry, work: W.Work, dtype: str, workspace: np.ndarray
) -> dict:
    """Arguments of gram_direct; x (N, C, *spatial) with any strides."""
    absent = 3 - len(geometry.axes)
    strides = [s // x.itemsize for s in x.strides]

    def three(name: str, default: int) -> list[int]:
        return [default] * absent + [getattr(a, name) for a in geometry.axes]

    return {
        "x": x.transpose(np.argsort(strides)[::-1]),  # the same memory, as C-contiguous
        "workspace": workspace,
        "items": make_tables(work, CPU).items.numpy(),
        "stride_n": strides[0],
        "stride_c": strides[1],
        "stride": [0] * absent + strides[2:],
        "size": three("size", 1),
        "output": three("output", 1),
        "kernel": three("kernel", 1),
        "conv_stride": three("stride", 1),
        "padding": three("padding", 0),
        "dilation": three("dilation", 1),
        "columns": work.channels,
        "item_count": len(work.items),
        "block": work.block,
        "dtype": DTYPES[dtype],
        "slots": work.slots,
    }
