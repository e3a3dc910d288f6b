"""A B^T of float32 matrices as exact as in float32, on tensor cores: "tf32x3".

The products by which an update forms M = R S R^T, but for the last one, which is symmetric
(``update``): R S^T, which is R S, and the decorrelated samples R Z^T or Z R^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import prepared
from dbp_kernels.backends.triton.configs import Config, configs, pinned
from dbp_kernels.backends.triton.dot import dot
from dbp_kernels.backends.triton.runtime import KernelCase, Launch, target
from dbp_kernels.precision import update_products


@triton.jit
def banded_tile(t, rows, columns, BAND: tl.constexpr):
    """Tile t of rows x columns tiles, as (row, column): column by column in bands of BAND rows.

    Programs that run at the same time then read few rows of either operand, from the L2 cache.
    """
    band = t // (BAND * columns)
    height = tl.minimum(rows - band * BAND, BAND)
    inside = t - band * BAND * columns
    return band * BAND + inside % height, inside // height


@triton.jit
def product_kernel(
    A,  # (G, M, K), K contiguous
    B,  # (G, N, K)
    C,  # (G, M, N)
    M,
    N,
    K,
    rows,  # tiles along M
    columns,  # tiles along N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # N and K are multiples of 16
):
    """C = A B^T. One program: one tile of C."""
    if ALIGNED:  # told so, the compiler uses 16-byte loads and stores
        N = N // 16 * 16
        K = K // 16 * 16
    tiles = rows * columns
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = banded_tile(tl.program_id(0) % tiles, rows, columns, 8)
    i = row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the last repeat it: cheaper than a mask, and nothing of them is kept. 64-bit from
    # the start: the loop only adds k.
    a = A + (group * M + tl.minimum(i, M - 1))[:, None] * K + k[None, :]
    b = B + (group * N + tl.minimum(j, N - 1))[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (k < K - start)[None, :]
        x = tl.load(a + start, mask=inside, other=0.0)
        y = tl.load(b + start, mask=inside, other=0.0)
        acc = dot(x, tl.trans(y), acc, PRECISION, False)
    c = C + (group * M + i)[:, None] * N + j[None, :]
    tl.store(c, acc, mask=(i < M)[:, None] & (j < N)[None, :])


KERNEL = "product"
PRECISION = "tf32x3"
# A larger tile has registers for the pointers of 16-byte loads and stores only: N and K are
# multiples of 16.
ANY_SIZE = 64 * 64 * 32
# Where TF32 has at least 8 times the rate of float32; elsewhere three products of it take longer
# than one of the library in float32.
_FAST = (80, 90, 100, 103)
# Multiply-adds from which on the kernel should win. Of its sibling for symmetric products, which has
# half the tiles, two took as long as the library's product on an H100 at D = 1152, 0.7 times as long
# at D = 2304. This kernel itself has not been timed.
_WORTH = 2**31
_THIN = 128  # along a shorter side than this, too much of the tiles is empty


def fits_any_size(config: Config) -> bool:
    return config.block_m * config.block_n * config.block_k <= ANY_SIZE


def usable(config: Config, columns: int, inner: int) -> bool:
    """Whether a tile has registers enough for such matrices."""
    return fits_any_size(config) or columns % 16 == inner % 16 == 0


def choose_config(
    groups: int, rows: int, columns: int, inner: int, device: torch.device
) -> Config | None:
    """The measured best, else the smallest tile; None: leave the product to the library."""
    work = groups * rows * columns * inner
    if target(device) not in _FAST or work < _WORTH or min(rows, columns) < _THIN:
        return None
    fit = [c for c in configs(KERNEL, PRECISION, target(device)) if usable(c, columns, inner)]
    sizes = {"groups": groups, "rows": rows, "columns": columns, "inner": inner}
    best = pinned(KERNEL, PRECISION, sizes, device)
    # Of the symmetric product's tiles an H100 ran 64 x 64 faster than 128 x 128, at D = 2304 and
    # 4608: several programs share a multiprocessor, and one multiplies while others split operands.
    return best if best in fit else fit[-1]


def product(A: Tensor, B: Tensor, config: Config | None = None) -> Tensor:
    """A B^T (G, M, N) for A (G, M, K), B (G, N, K) float32, in the precision of an update's M.

    By the kernel where it should win or a ``config`` is given, else by the library.
    """
    launch = _launch(A, B.shape[1], config)
    if launch is None:
        return torch.bmm(A, B.mT)
    C = A.new_empty(A.shape[0], A.shape[1], B.shape[1])
    launch(A=A.contiguous(), B=B.contiguous(), C=C)
    return C


@prepared
def _launch(A: Tensor, columns: int, config: Config | None) -> Launch | None:
    """The launch without its tensors; None: the library's product."""
    groups, rows, inner = A.shape
    if config is None and update_products() == PRECISION:
        config = choose_config(groups, rows, columns, inner, A.device)
    if config is None:
        return None
    tiles = triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n)
    return Launch(
        product_kernel,
        (groups * tiles[0] * tiles[1],),
        rows,
        columns,
        inner,
        *tiles,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=PRECISION,
        ALIGNED=columns % 16 == inner % 16 == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def cases(capability: int) -> list[KernelCase]:
    """Every shipped variant of the kernel for a compute capability."""
    return [
        KernelCase(
            name=f"product[{PRECISION}, {c.text}{', aligned' * aligned}]",
            kernel=product_kernel,
            signature={
                **dict.fromkeys(("A", "B", "C"), "*fp32"),
                **dict.fromkeys(("M", "N", "K", "rows", "columns"), "i32"),
            },
            constexprs={
                "BLOCK_M": c.block_m,
                "BLOCK_N": c.block_n,
                "BLOCK_K": c.block_k,
                "PRECISION": PRECISION,
                "ALIGNED": aligned,
            },
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            tensor_cores=True,
            divisible=() if aligned else ("K",),
        )
        for c in configs(KERNEL, PRECISION, capability)
        for aligned in (True, False)
        if aligned or fits_any_size(c)
    ]
