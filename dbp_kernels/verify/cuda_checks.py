"""Checks of the CUDA C++ kernels: every tile of every kernel, on small problems."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dbp_kernels.backends.cuda import gram, library, pack, shift_plan, stats, update
from dbp_kernels.verify.checks import (
    RULE,
    Check,
    Problem,
    convolution,
    moments,
    statistics,
    weighed,
)

PRECISIONS = ("bf16", "ieee", "tf32", "fp16")
# Two tiles of channels, the second one not full; strips at all borders.
_SHIFT = {
    64: convolution("3x3 72@9x7", (2, 72, 9, 7), 3, padding=1),
    32: convolution("3x3 40@9x7, NCHW", (2, 40, 9, 7), 3, padding=1, channels_last=False),
    16: convolution("5x5 24@9x8, 2 groups", (2, 24, 9, 8), 5, padding=2, groups=2),
}
_BOX = {
    128: convolution("2x1 stride 2, 136@9x7", (2, 136, 9, 7), (2, 1), stride=2, padding=1),
    64: convolution("1x1 72@9x7", (2, 72, 9, 7), 1),
    32: Problem("rows of 40", (150, 40)),
    16: convolution("3d 2x3x2, 20@4x5x6", (2, 20, 4, 5, 6), (2, 3, 2), stride=2, padding=1),
}
_DIRECT = {
    128: convolution("7x7 stride 2, 3@17x15", (2, 3, 17, 15), 7, stride=2, padding=3),
    64: convolution("3x3 7@9x8, NCHW", (3, 7, 9, 8), 3, padding=1, channels_last=False),
    32: convolution("3x3 3@9x8", (3, 3, 9, 8), 3, padding=1),
    16: convolution("3x3 4@9x8, depthwise", (3, 4, 9, 8), 3, padding=1, groups=4),
}
_STATS = (
    convolution("3x3 14@9x8", (3, 14, 9, 8), 3, padding=1),
    convolution("3x3 7@9x8, NCHW", (3, 7, 9, 8), 3, padding=1, channels_last=False),
    convolution("3x3 3@9x8", (3, 3, 9, 8), 3, padding=1),
)
_SM90 = (
    convolution("3x3 72@9x7", (2, 72, 9, 7), 3, padding=1),
    convolution("3x3 64@14x14", (4, 64, 14, 14), 3, padding=1),
)
_SM90_PLAIN = (
    convolution("1x1 136@9x7", (2, 136, 9, 7), 1),
    Problem("rows of 200", (3000, 200)),
)
_LARGE = (
    convolution("3x3 64@56x56", (8, 64, 56, 56), 3, padding=1),
    convolution("3x3 512@7x7", (4, 512, 7, 7), 3, padding=1),
)
_LARGE_BOX = convolution("3x3 stride 2, 128@28x28", (8, 128, 28, 28), 3, stride=2, padding=1)
_LARGE_DIRECT = convolution("7x7 stride 2, 3@112x112", (8, 3, 112, 112), 7, stride=2, padding=3)
_GRAMS = {
    "gram_shift": gram.patch_gram_shift,
    "gram_box": gram.patch_gram_box,
    "gram_direct": gram.patch_gram_direct,
}


def checks(scope: str, capability: int) -> Iterator[Check]:
    """As ``cases.checks``."""
    for precision in PRECISIONS:
        for block in shift_plan.BLOCKS:
            yield _gram("gram_shift", block, precision, _SHIFT[block])
        for block in gram.BLOCKS:
            yield _gram("gram_box", block, precision, _BOX[block])
            yield _gram("gram_direct", block, precision, _DIRECT[block])
        if precision != "tf32":  # its arithmetic is float32's
            for problem in _STATS:
                yield Check(
                    "cuda", "stats", f"D = {problem.geometry.dim}", precision,
                    **statistics(stats.decor_stats, problem),
                )  # fmt: skip
    for dim in (1, 27, 80):
        yield _weigh(dim)
    for source in ("ieee", "bf16", "fp16"):
        yield _pack(source)
    if capability == 90 and "9.0a" in (library.build_text() or ""):
        yield from _sm90()
    if scope == "all":
        for precision in PRECISIONS:
            for problem in _LARGE:
                yield _gram("gram_shift", None, precision, problem)
            yield _gram("gram_box", None, precision, _LARGE_BOX)
            yield _gram("gram_direct", None, precision, _LARGE_DIRECT)


def _gram(kernel: str, block: int | None, precision: str, problem: Problem) -> Check:
    text = f"tiles of {block}" if block else "its own choice"
    compute = partial(_GRAMS[kernel], block=block)
    return Check("cuda", kernel, text, precision, **moments(compute, problem))


def _sm90() -> Iterator[Check]:
    for precision in ("bf16", "fp16"):
        for problem in _SM90:
            compute = partial(gram.patch_gram_shift, sm90=True)
            fields = moments(compute, problem)
            yield Check("cuda", "gram_shift_sm90", "tiles of 64", precision, **fields)
        for problem in _SM90_PLAIN:
            fields = moments(gram.patch_gram_matrix_sm90, problem)
            yield Check("cuda", "gram_matrix_sm90", "tiles of 128", precision, **fields)


def _weigh(dim: int) -> Check:
    """The update's epilogue on M = R R^T, which a library multiplies."""

    def compute(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        M = torch.bmm(R, R.mT)
        loss, _ = update.weigh(M, RULE)
        return M, loss

    problem = Problem(f"D = {dim}, 2 groups", (4, 2 * dim), groups=2)
    return Check("cuda", "update", f"D = {dim}", "ieee", problem, compute, weighed)


def _pack(precision: str) -> Check:
    """Less a mean, into rows of channels with zeros at their ends."""

    def compute(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        return (pack.pack(x, torch.float32, _mean(x)),)

    def exact(x: Tensor, R: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        rows = torch.zeros(*x.shape[:1], 20, *x.shape[2:], dtype=x.dtype)
        rows[:, : x.shape[1]] = x - _mean(x)[:, None, None]
        return (rows,)

    problem = convolution("17@9x7, NCHW", (2, 17, 9, 7), 1, channels_last=False)
    return Check("cuda", "pack", "to float32", precision, problem, compute, exact)


def _mean(x: Tensor) -> Tensor:
    """Not x's own: any numbers that are the same in all precisions."""
    return torch.arange(x.shape[1], device=x.device).to(
        torch.float64 if x.dtype == torch.float64 else torch.float32
    )
