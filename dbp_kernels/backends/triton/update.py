"""The update from a second moment: M = <x x^T>, half of it computed, and its epilogue in one kernel.

With P = R S: M = P R^T is symmetric, so only tiles on and above the diagonal are computed; each
writes E = [c_weight offdiag(M) + v_weight (diag(M) - 1)] for itself and its mirror image, and its part
of the two sums of squares that make loss and norm. M itself is never stored. E R is a library product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbp_kernels.backends.prepared import prepared
from dbp_kernels.backends.triton.configs import Config, configs, pinned
from dbp_kernels.backends.triton.dot import dot
from dbp_kernels.backends.triton.product import product
from dbp_kernels.backends.triton.runtime import KernelCase, Launch, sm_count, target
from dbp_kernels.precision import products_of_change, update_products
from dbp_kernels.rules import Update, UpdateRule


@triton.jit
def upper_tile(t, side):
    """Tile t of the upper triangle of side x side tiles, as (row, column).

    The triangle is folded into a rectangle: row r and the r + 1 (side even) or r (odd) tiles of a
    row at the bottom make one line of it.
    """
    odd = side % 2
    width = side + 1 - odd
    r = t // width
    c = t % width
    bottom = c < r + 1 - odd
    return (
        tl.where(bottom, side - 1 - r + odd, r),
        tl.where(bottom, side - 1 - c, c - 1 + odd),
    )


@triton.jit
def symmetric_update_kernel(
    A,  # (G, D, K), K contiguous
    B,  # (G, D, K)
    E,  # (G, D, D)
    sums,  # (2, G, tiles): of C^2, of v^2
    D,
    K,
    side,  # tiles along D
    alpha,
    c_weight,
    v_weight,
    idle_weight,  # as v_weight, where M has 0
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # D and K are multiples of 16
):
    """E and the loss from M = alpha A B^T, known to be symmetric. One program: one tile, mirrored."""
    if ALIGNED:  # told so, the compiler uses 16-byte loads and stores
        D = D // 16 * 16
        K = K // 16 * 16
    tiles = side * (side + 1) // 2
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = upper_tile(tl.program_id(0) % tiles, side)
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond D repeat the last one: cheaper than a mask, and nothing of them is kept. 64-bit
    # from the start: the loop only adds k.
    a = A + (group * D + tl.minimum(i, D - 1))[:, None] * K + k[None, :]
    b = B + (group * D + tl.minimum(j, D - 1))[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (k < K - start)[None, :]
        x = tl.load(a + start, mask=inside, other=0.0)
        y = tl.load(b + start, mask=inside, other=0.0)
        acc = dot(x, tl.trans(y), acc, PRECISION, False)
    acc *= alpha

    diagonal = i[:, None] == j[None, :]
    inside = (i < D)[:, None] & (j < D)[None, :]
    twice = tl.where(row == column, 1.0, 2.0)  # a tile off the diagonal stands for two
    v = acc - 1.0
    tile = sums + tl.program_id(0)
    tl.store(tile, twice * tl.sum(tl.where(inside & (i[:, None] != j[None, :]), acc * acc, 0.0)))
    tile += tl.num_programs(0)
    tl.store(tile, tl.sum(tl.where(inside & diagonal, v * v, 0.0)))

    e = tl.where(diagonal, tl.where(acc <= 0.0, idle_weight, v_weight) * v, c_weight * acc)
    block = E + group * D * D
    tl.store(block + i.to(tl.int64)[:, None] * D + j[None, :], e, mask=inside)
    if row != column:
        tl.store(block + j.to(tl.int64)[None, :] * D + i[:, None], e, mask=inside)


KERNEL = "symmetric_update"
# A larger tile has registers for the pointers of 16-byte loads only: D and K are multiples of 16.
ANY_SIZE = 64 * 64 * 32


def fits_any_size(config: Config) -> bool:
    return config.block_m * config.block_n * config.block_k <= ANY_SIZE


def choose_config(
    groups: int, dim: int, inner: int, precision: str, device: torch.device
) -> Config:
    """The measured best, else the largest tile that gives every multiprocessor a program.

    Tiles below 32 are for matrices below 32 only.
    """
    usable = [
        c
        for c in configs(KERNEL, precision, target(device))
        if fits_any_size(c) or dim % 16 == inner % 16 == 0
    ]
    best = pinned(KERNEL, precision, {"groups": groups, "dim": dim, "inner": inner}, device)
    if best in usable:
        return best
    useful = [c for c in usable if c.block_m < 2 * dim] or usable[-1:]
    for config in useful:
        if config.block_m <= 32 or groups * _tiles(dim, config) >= sm_count(device):
            return config
    return useful[-1]


def _tiles(dim: int, config: Config) -> int:
    """Tiles on and above the diagonal."""
    side: int = triton.cdiv(dim, config.block_m)
    return side * (side + 1) // 2


def symmetric_update(
    A: Tensor,
    B: Tensor,
    alpha: float,
    rule: UpdateRule,
    config: Config | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """E (G, D, D), loss (G,) and ||M'||_F^2 (G,) of M = alpha A B^T, which is symmetric.

    A, B (G, D, K) float32. The last is None unless the rule is guarded; E is that of `UpdateRule`.
    E is written to ``out`` if given (contiguous).
    """
    groups, dim, _ = A.shape
    A, B = A.contiguous(), B.contiguous()
    launch, tiles = _launch(A, alpha, rule, config)
    E = torch.empty(groups, dim, dim, dtype=A.dtype, device=A.device) if out is None else out
    sums = A.new_empty(2, groups, tiles)
    launch(A=A, B=B, E=E, sums=sums)
    off, on = sums.sum(-1).unbind()
    return E, rule.loss(off, on), rule.square(off, on)


@prepared
def _launch(A: Tensor, alpha: float, rule: UpdateRule, config: Config | None) -> tuple[Launch, int]:
    """The launch without its tensors, and the tiles of one matrix."""
    groups, dim, inner = A.shape
    precision = update_products()
    config = config or choose_config(groups, dim, inner, precision, A.device)
    tiles = _tiles(dim, config)
    launch = Launch(
        symmetric_update_kernel,
        (groups * tiles,),
        dim,
        inner,
        triton.cdiv(dim, config.block_m),
        alpha,
        rule.c_weight,
        rule.v_weight,
        rule.idle_weight,
        BLOCK=config.block_m,
        BLOCK_K=config.block_k,
        PRECISION=precision,
        ALIGNED=dim % 16 == 0 and inner % 16 == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return launch, tiles


def gram_update(
    S: Tensor,
    R: Tensor,
    rule: UpdateRule,
    overwrite: bool = False,
    config: Config | None = None,
) -> Update:
    """Plan "gram", as ``rules.gram_update``. S, R (G, D, D) float32."""
    # R S^T = R S and not S R^T, which is its transpose: the kernel wants rows with K contiguous
    P = product(R, S)
    E, loss, square = symmetric_update(P, R, 1.0, rule, config, out=S if overwrite else None)
    with products_of_change(R):
        return Update(loss, square, 1.0, torch.bmm(E, R, out=P))


def direct_update(Z: Tensor, R: Tensor, rule: UpdateRule, config: Config | None = None) -> Update:
    """Plan "direct", as ``rules.direct_update``. Z (G, n, D), R (G, D, D) float32, n >= 1."""
    X = product(R, Z)  # (G, D, n)
    E, loss, square = symmetric_update(X, X, 1 / Z.shape[1], rule, config)
    with products_of_change(R):
        return Update(loss, square, 1.0, torch.bmm(E, R))


def cases(capability: int) -> list[KernelCase]:
    """Every shipped variant of the kernel for a compute capability."""
    pointers = dict.fromkeys(("A", "B", "E", "sums"), "*fp32")
    integers = dict.fromkeys(("D", "K", "side"), "i32")
    floats = dict.fromkeys(("alpha", "c_weight", "v_weight", "idle_weight"), "fp32")
    return [
        KernelCase(
            name=f"symmetric_update[{precision}, {c.text}{', aligned' * aligned}]",
            kernel=symmetric_update_kernel,
            signature={**pointers, **integers, **floats},
            constexprs={
                "BLOCK": c.block_m,
                "BLOCK_K": c.block_k,
                "PRECISION": precision,
                "ALIGNED": aligned,
            },
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            tensor_cores=precision != "ieee" and c.block_m >= 64,  # wgmma has 64 rows
        )
        for precision in ("tf32x3", "tf32", "ieee")
        for c in configs(KERNEL, precision, capability)
        for aligned in (True, False)
        if aligned or fits_any_size(c)
    ]
