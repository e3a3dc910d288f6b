"""Checks of the Triton kernels: every configuration the planner can choose, or all that ship."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from dbp_kernels.backends.triton import (
    configs,
    gram_direct,
    gram_shift,
    gram_shift_tma,
    product,
    stats,
    update,
)
from dbp_kernels.backends.triton.configs import Config
from dbp_kernels.verify.checks import (
    RULE,
    Check,
    Problem,
    convolution,
    moments,
    statistics,
    weighed,
)

PRECISIONS = ("bf16", "ieee", "tf32", "fp16")  # the commonest first
_OFTEN = ("bf16", "ieee")
# Of gram_shift, by the side of its tile: two tiles of channels, the second one not full.
_SHIFT = {
    128: convolution("2x1 136@5x6", (2, 136, 5, 6), (2, 1), padding=1),
    64: convolution("2x2 stride 2, 72@9x7", (2, 72, 9, 7), 2, stride=2, padding=1),
    32: convolution("3x1 40@8x7, NCHW", (2, 40, 8, 7), (3, 1), padding=1, channels_last=False),
    16: convolution("3x3 12@9x7, 2 groups", (2, 12, 9, 7), 3, padding=1, groups=2),
}
_PLAIN = (
    convolution("1x1 72@9x7", (2, 72, 9, 7), 1),
    Problem("rows of 72", (150, 72)),
    convolution("1d 5, 24@40", (3, 24, 40), 5, padding=2),
    convolution("3d 2x3x2, 8@4x5x6", (2, 8, 4, 5, 6), (2, 3, 2), padding=1),
)
# Of gram_direct and decor_stats, which take any D up to their tile or several tiles of it.
_DIRECT = {
    64: convolution("7x7 stride 2, 3@17x15", (2, 3, 17, 15), 7, stride=2, padding=3),
    32: convolution("3x3 3@9x8, NCHW", (3, 3, 9, 8), 3, padding=1, channels_last=False),
    16: convolution("3x3 4@9x8, depthwise", (3, 4, 9, 8), 3, padding=1, groups=4),
}
_STATS = {
    128: convolution("3x3 14@9x8", (3, 14, 9, 8), 3, padding=1),
    64: convolution("3x3 7@9x8", (3, 7, 9, 8), 3, padding=1),
    32: convolution("3x3 3@9x8, NCHW", (3, 3, 9, 8), 3, padding=1, channels_last=False),
    16: convolution("3x3 4@9x8, depthwise", (3, 4, 9, 8), 3, padding=1, groups=4),
}
# Larger ones, of several tiles and many splits.
_LARGE = (
    convolution("3x3 64@56x56", (8, 64, 56, 56), 3, padding=1),
    convolution("3x3 512@7x7", (4, 512, 7, 7), 3, padding=1),
    convolution("1x1 256@14x14", (8, 256, 14, 14), 1),
    convolution("1d 7, 33@1000", (16, 33, 1000), 7, padding=3),
    convolution("3d 3x3x3, 17@9x12x11", (2, 17, 9, 12, 11), 3, padding=1),
)
_LARGE_DIRECT = convolution("7x7 stride 2, 3@112x112", (8, 3, 112, 112), 7, stride=2, padding=3)


def checks(scope: str, capability: int) -> Iterator[Check]:
    """As ``cases.checks``."""
    for precision in PRECISIONS:
        yield from _grams(precision, capability)
    yield from _updates("tf32x3", capability)
    yield from _products(capability)
    for precision in ("ieee", "tf32"):
        yield from _updates(precision, capability)
        yield from _statistics(precision, capability)
    if scope == "all" or configs.measured(gram_shift_tma.KERNEL, capability):
        yield from _by_descriptors(capability)
    if scope == "all":
        yield from _beyond()


def _gram(
    module: Any, compute: Callable[..., Tensor], precision: str, c: Config | None, problem: Problem
) -> Check:
    text = c.text if c else "its own choice"
    fields = moments(lambda x, g: compute(x, g, c), problem)
    return Check("triton", module.KERNEL, text, precision, **fields)


def _grams(precision: str, capability: int) -> Iterator[Check]:
    shift = partial(_gram, gram_shift, gram_shift.patch_gram_shift, precision)
    direct = partial(_gram, gram_direct, gram_direct.patch_gram_direct, precision)
    for c in configs.configs(gram_shift.KERNEL, precision, capability):
        yield shift(c, _SHIFT[c.block_m])
    for c in configs.configs(gram_direct.KERNEL, precision, capability):
        yield direct(c, _DIRECT[c.block_m])
    if precision in _OFTEN:  # other numbers of axes are other code, and so are large tensors
        yield from _wide(precision)
        for problem in _PLAIN:
            yield (direct if problem.geometry.pointwise else shift)(None, problem)


def _wide(precision: str) -> Iterator[Check]:
    """With addresses of 64 bits, which inputs of 2^31 elements need."""
    for module, compute, problem in (
        (gram_shift, gram_shift.patch_gram_shift, _SHIFT[16]),
        (gram_direct, gram_direct.patch_gram_direct, _DIRECT[32]),
    ):
        wide = moments(partial(compute, index64=True), problem)
        yield Check("triton", module.KERNEL, "64-bit addresses", precision, **wide)


def _statistics(precision: str, capability: int) -> Iterator[Check]:
    for c in configs.configs(stats.KERNEL, precision, capability):
        # R's products are of this precision whatever the input is
        compute = partial(_stats, config=c)
        fields = statistics(compute, _STATS[c.block_m])
        yield Check("triton", stats.KERNEL, c.text, precision, **fields)


def _stats(x: Tensor, R: Tensor, geometry: Any, config: Config) -> tuple[Tensor, ...]:
    return stats.decor_stats(x, R, geometry, config=config)


def _updates(precision: str, capability: int) -> Iterator[Check]:
    for c in configs.configs(update.KERNEL, precision, capability):
        for dim in (c.block_m + 16, c.block_m + 3):  # with and without masks
            if dim % 16 == 0 or update.fits_any_size(c):
                yield _update(c, precision, dim)


def _update(c: Config, precision: str, dim: int) -> Check:
    """E and the loss of M = R R^T."""

    def compute(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        return update.symmetric_update(R, R, 1.0, RULE, c)[:2]

    problem = Problem(f"D = {dim}, 2 groups", (4, 2 * dim), groups=2)
    return Check("triton", update.KERNEL, c.text, precision, problem, compute, weighed)


def _products(capability: int) -> Iterator[Check]:
    for c in configs.configs(product.KERNEL, product.PRECISION, capability):
        for dim in (c.block_m + 16, c.block_m + 3):  # with and without masks
            if product.usable(c, dim, dim):
                yield _product(c, dim)


def _product(c: Config, dim: int) -> Check:
    """All rows of R but one times the transpose of R."""

    def compute(x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        return (product.product(R[:, 1:], R, c),)

    def exact(x: Tensor, R: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        return (R[:, 1:] @ R.mT,)

    problem = Problem(f"D = {dim}, 2 groups", (4, 2 * dim), groups=2)
    return Check("triton", product.KERNEL, c.text, product.PRECISION, problem, compute, exact)


def _by_descriptors(capability: int) -> Iterator[Check]:
    """What is chosen only where it was measured to be faster."""
    for precision in ("bf16", "fp16"):
        for c in configs.configs(gram_shift_tma.KERNEL, precision, capability):
            if capability >= 90:
                compute = gram_shift_tma.patch_gram_shift_tma
                yield _gram(gram_shift_tma, compute, precision, c, _SHIFT[min(c.block_m, 64)])


def _beyond() -> Iterator[Check]:
    """Larger problems, and 64-bit addresses in the other precisions."""
    for precision in (p for p in PRECISIONS if p not in _OFTEN):
        yield from _wide(precision)
    for precision in PRECISIONS:
        for problem in _LARGE:
            pointwise = problem.geometry.pointwise
            compute = gram_direct.patch_gram_direct if pointwise else gram_shift.patch_gram_shift
            yield _gram(gram_shift, compute, precision, None, problem)
        yield _gram(gram_direct, gram_direct.patch_gram_direct, precision, None, _LARGE_DIRECT)
