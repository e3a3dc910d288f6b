"""The second pass of every second moment: sums the partial tiles into S, mirrored and scaled.

One program writes one square of S (and its mirror image): every element adds the slots its tap pair
lists, in that order, so two runs agree bit for bit and S is exactly symmetric. Elements without a
slot are zero; nothing has to be cleared beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dbp_kernels.backends.tables import Tables
from dbp_kernels.backends.triton.runtime import KernelCase, Launch
from dbp_kernels.planning.boxes import SYMMETRIC, TRANSPOSED
from dbp_kernels.planning.work import Work

_TRANSPOSED = tl.constexpr(TRANSPOSED)
_SYMMETRIC = tl.constexpr(SYMMETRIC)
_MAX_INT = 2**31 - 1
SQUARE, WARPS = 32, 8  # what a program writes, and its warps


# one tap is worth a compilation of its own (columns are channels then), other sizes are not
@triton.jit(
    do_not_specialize=(
        "channels",
        "group_channels",
        "straight",
        "symmetric",
        "symmetric_base",
        "longest",
        "squares",
    )
)
def reduce_kernel(
    workspace,  # (slots, BLOCK, BLOCK)
    out,  # (groups, D, D)
    tiles,  # tables, see work.Tables
    taps,
    slots,
    channels,
    group_channels,
    tap_count,
    straight,  # slots of one tile pair
    symmetric,  # of one upper tile pair, for symmetric boxes
    symmetric_base,
    longest,
    squares,  # of S along one side of a tile pair
    scale,
    BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
    INDEX64: tl.constexpr,
):
    """One square of S: rows (c, k) with c in channel tile i, columns (c', k') with c' in tile j."""
    program = tl.program_id(0)
    a = program // squares % squares
    b = program % squares
    upper = program // (squares * squares)
    i = tl.load(tiles + upper * 4)
    j = tl.load(tiles + upper * 4 + 1)
    pair = tl.load(tiles + upper * 4 + 2)
    transposed_pair = tl.load(tiles + upper * 4 + 3)
    # rows and columns of the matrix of all channels; its diagonal blocks are the groups' S
    side = BLOCK * tap_count
    first_row = a * SQUARE
    first_column = b * SQUARE
    mirrored = (i == j) & (a > b)
    outside = j * side + first_column >= channels * tap_count
    row_stop = i * side + min(first_row + SQUARE, side)
    last_group = (row_stop - 1) // (group_channels * tap_count)
    outside |= last_group < (j * side + first_column) // (group_channels * tap_count)
    if mirrored | outside:
        return

    row = first_row + tl.arange(0, SQUARE)
    column = first_column + tl.arange(0, SQUARE)
    c = row // tap_count
    d = column // tap_count
    index = (row - c * tap_count)[:, None] * tap_count + (column - d * tap_count)[None, :]
    group = (i * BLOCK + c) // group_channels
    column_group = (j * BLOCK + d) // group_channels
    inside_row = (row < side) & (i * BLOCK + c < channels)
    inside_column = (column < side) & (j * BLOCK + d < channels)
    inside = inside_row[:, None] & inside_column[None, :]
    inside = inside & (group[:, None] == column_group[None, :])

    first = tl.load(taps + index * 3, mask=inside, other=0)
    count = tl.load(taps + index * 3 + 1, mask=inside, other=0)
    kind = tl.load(taps + index * 3 + 2, mask=inside, other=0)
    if INDEX64:
        pair = pair.to(tl.int64)
        transposed_pair = transposed_pair.to(tl.int64)
        symmetric_base = symmetric_base.to(tl.int64)
        upper = upper.to(tl.int64)
    base = tl.where(kind == _TRANSPOSED, transposed_pair * straight, pair * straight)
    base = tl.where(kind == _SYMMETRIC, symmetric_base + upper * symmetric, base)
    # of a symmetric block only the upper triangle is read, also within a tile
    swap = (kind == _TRANSPOSED) | ((kind == _SYMMETRIC) & (i == j) & (c[:, None] > d[None, :]))
    within = tl.where(swap, d[None, :] * BLOCK + c[:, None], c[:, None] * BLOCK + d[None, :])

    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for entry in range(longest):
        live = entry < count
        slot = base + tl.load(slots + first + entry, mask=live, other=0)
        total += tl.load(workspace + slot * (BLOCK * BLOCK) + within, mask=live, other=0.0)
    total *= scale

    dim = group_channels * tap_count
    if INDEX64:
        dim = dim.to(tl.int64)
    r = i * side + row
    s = j * side + column
    corner = group * dim  # first row and column of the group
    at = out + (corner * dim)[:, None]
    at += (r - corner)[:, None] * dim + s[None, :] - corner[:, None]
    tl.store(at, total, mask=inside)
    if (i != j) | (a != b):
        corner = column_group * dim
        at = out + (corner * dim)[:, None]
        at += (s - corner)[:, None] * dim + r[None, :] - corner[:, None]
        tl.store(at, tl.trans(total), mask=tl.trans(inside))


def reduction(work: Work, tables: Tables, samples: int, index64: bool = False) -> Launch:
    """The launch that makes out (groups, D, D) of a filled workspace, its arguments.

    Sums over the slots are divided by ``samples``. ``index64`` forces 64-bit addresses; they are
    used anyway where 32 bits might not do.
    """
    taps = work.program.taps
    numel = work.channels * work.group_channels * taps**2
    squares = triton.cdiv(work.block * taps, SQUARE)
    return Launch(
        reduce_kernel,
        (len(work.upper) * squares * squares,),
        tables.tiles,
        tables.taps,
        tables.slots,
        work.channels,
        work.group_channels,
        taps,
        work.straight,
        work.symmetric,
        work.symmetric_base,
        tables.longest,
        squares,
        1 / samples,
        BLOCK=work.block,
        SQUARE=SQUARE,
        INDEX64=index64 or max(work.workspace, numel) > _MAX_INT,
        num_warps=WARPS,
        num_stages=2,
    )


def cases(target: int) -> list[KernelCase]:
    """What ``reduce`` launches, for the tile sides in use."""
    del target  # the same everywhere: no shared memory beyond a square's transposition
    types = dict.fromkeys(("workspace", "out"), "*fp32")
    types |= dict.fromkeys(("tiles", "taps", "slots"), "*i32")
    integers = ("channels", "group_channels", "tap_count", "straight", "symmetric")
    types |= dict.fromkeys((*integers, "symmetric_base", "longest", "squares"), "i32")
    types["scale"] = "fp32"
    found = []
    for block in (16, 32, 64, 128):
        for one_tap in (False, True):
            for wide in (False, True):
                constexprs: dict[str, object] = {"BLOCK": block, "SQUARE": SQUARE, "INDEX64": wide}
                signature = dict(types)
                if one_tap:
                    constexprs["tap_count"] = 1
                    del signature["tap_count"]
                name = f"reduce[{block}{', one tap' * one_tap}{', int64' * wide}]"
                found.append(
                    KernelCase(name, reduce_kernel, signature, constexprs, WARPS, 2, False)
                )
    return found
