"""The second pass of a second moment, partial tiles to S: csrc/kernels/reduce.cuh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.tables import Tables
from dbp_kernels.planning.work import Work


def reduction(work: Work, tables: Tables, samples: int) -> Callable[..., None]:
    """The launch that makes out (groups, D, D) of workspace (slots, block, block), its arguments.

    Sums are divided by ``samples``.
    """
    return partial(
        library.launch,
        "reduce",
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
