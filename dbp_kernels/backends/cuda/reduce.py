"""The second pass of a second moment, partial tiles to S: csrc/kernels/reduce.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton.work import Tables, Work
from . import library


def reduce(workspace: Tensor, work: Work, tables: Tables, samples: int) -> Tensor:
    """S (groups, D, D) from the workspace (slots, block, block): sums divided by ``samples``."""
    dim = work.group_channels * work.program.taps
    groups = work.channels // work.group_channels
    S = torch.empty(groups, dim, dim, dtype=torch.float32, device=workspace.device)
    library.launch(
        "reduce",
        workspace=workspace,
        out=S,
        tiles=tables.tiles,
        taps=tables.taps,
        slots=tables.slots,
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
    return S
