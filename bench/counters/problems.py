"""What is simulated: calls of the backends' kernels at the sizes of ResNets' sampled tenth, batch 26.

The first call of a problem is as the backend makes it, all its launches counted; others have one shipped
configuration each, of which the launch that has it is counted. float16 is left out: its code is that
of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dbp_kernels.precision import products_in
from dbp_kernels.rules import UpdateRule
from dbp_kernels.tools import tune
from dbp_kernels.tools.cases import Case, conv, linear, random_input

CPU = torch.device("cpu")
BATCH = 26
QUICK_TARGETS, TARGETS = (80, 90), (80, 90, 89)


class Call(NamedTuple):
    """What is run under the stand-in. ``kernel``: the one whose launches count; None: all do."""

    run: Callable[[], object]
    kernel: str | None = None


@dataclass(frozen=True)
class Problem:
    """``calls(target)`` makes the inputs and gives the calls, of none where no kernel is for them.

    ``quick`` problems are those of ``--quick``, with their first call alone.
    """

    backend: str
    precision: str
    name: str
    calls: Callable[[int], Iterator[Call]]
    quick: bool = False
    targets: tuple[int, ...] = TARGETS


def problems() -> list[Problem]:
    """All of them, in a fixed order; no two have backend, precision and name in common."""
    return [*_cuda(), *_triton()]


# --------------------------------------------------------------------------- layers

LAYERS = tuple(
    conv(BATCH, channels, size, 3) for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
)
WIDE = LAYERS[2]  # has whole tiles of every size
STRIDED = conv(BATCH, 64, 56, 3, stride=2)
POINTWISE = conv(BATCH, 256, 14, 1)
STEM = conv(BATCH, 3, 224, 7, stride=2)
LINEAR = linear(BATCH * 49, 2048)
# Of short patches, for the statistics; those of 16 have a place in every tile.
SHORT = (conv(BATCH, 3, 32, 3), conv(BATCH, 64, 56, 1), conv(BATCH, 128, 28, 1))
SHORTEST = conv(BATCH, 16, 56, 1)
DIMS = (576, 2304)


def _input(case: Case, precision: str, channels_last: bool = True) -> Tensor:
    return random_input(case, CPU, tune.PRECISIONS[precision], channels_last)


def _copies(backend: str, pack: Callable[[Tensor], Tensor]) -> Iterator[Problem]:
    """From the planes that torch makes by default."""

    def calls(case: Case, target: int) -> Iterator[Call]:
        yield Call(partial(pack, _input(case, "bf16", channels_last=False)))

    for case in (LAYERS[0], STEM):
        quick = case is LAYERS[0]
        yield Problem(backend, "bf16", f"pack {case.name}", partial(calls, case), quick)


# --------------------------------------------------------------------------- CUDA C++


def _cuda() -> Iterator[Problem]:
    from dbp_kernels.backends.cuda import gram, stats
    from dbp_kernels.backends.cuda.pack import pack

    shift, box, direct = gram.patch_gram_shift, gram.patch_gram_box, gram.patch_gram_direct
    sm90, matrix = partial(shift, sm90=True), gram.patch_gram_matrix_sm90
    for case in LAYERS:
        quick = case is not LAYERS[3]
        yield _cuda_gram("sm90", sm90, case, "bf16", quick=quick, targets=(90,))
        if case is not WIDE:
            yield _cuda_gram("shift", shift, case, "bf16", quick=case is LAYERS[0])
    for case in (POINTWISE, LINEAR):
        quick = case is POINTWISE
        yield _cuda_gram("matrix", matrix, case, "bf16", quick=quick, targets=(90,))
    yield _cuda_gram("box", box, STRIDED, "bf16", quick=True)
    for precision in ("bf16", "tf32", "ieee"):
        quick = precision == "bf16"
        yield _cuda_gram("shift", shift, WIDE, precision, gram.SHIFT_BLOCKS, quick)
        yield _cuda_gram("box", box, POINTWISE, precision, gram.BLOCKS, quick)
        yield _cuda_gram("direct", direct, STEM, precision, gram.BLOCKS, quick)
    yield from _copies("cuda", pack)
    for case in SHORT:
        yield Problem(
            "cuda",
            "ieee",
            f"stats {case.name}",
            partial(_cuda_stats, stats.decor_stats, case),
            case is SHORT[1],
        )
    for dim in DIMS:
        yield Problem("cuda", "ieee", f"update D {dim}", partial(_cuda_update, dim), dim == DIMS[0])


def _cuda_gram(
    form: str,
    compute: Callable[..., Tensor],
    case: Case,
    precision: str,
    tiles: Sequence[int] = (),
    quick: bool = False,
    targets: tuple[int, ...] = TARGETS,
) -> Problem:
    def calls(target: int) -> Iterator[Call]:
        x = _input(case, precision)

        def run(*tile: int) -> None:
            with products_in(precision):
                compute(x, case.geometry, *tile)

        yield Call(run)
        yield from (Call(partial(run, tile), f"gram_{form}") for tile in tiles)

    return Problem("cuda", precision, f"{form} {case.name}", calls, quick, targets)


def _cuda_stats(compute: Callable[..., object], case: Case, target: int) -> Iterator[Call]:
    R = torch.eye(case.D).expand(case.groups, case.D, case.D).contiguous()
    yield Call(partial(compute, _input(case, "bf16"), R, case.geometry))


def _cuda_update(dim: int, target: int) -> Iterator[Call]:
    from dbp_kernels.backends.cuda.update import weigh

    yield Call(partial(weigh, torch.zeros(1, dim, dim), UpdateRule.make("standard", 0.5, dim)))


# --------------------------------------------------------------------------- Triton

# By the tuner's names. The backend's own choice alone:
_CHOSEN = (
    *(f"gram_shift bf16: {case.name}" for case in (*LAYERS[:2], LAYERS[3], STRIDED, POINTWISE)),
    *(f"gram_shift_tma bf16: {case.name}" for case in (*LAYERS[:2], LAYERS[3])),
    *(f"decor_stats tf32: {case.name}" for case in SHORT[:2]),
    *(f"symmetric_update tf32x3: 1 of D {dim}" for dim in DIMS[1:]),
)
# All shipped configurations:
_ALL = (
    *(f"gram_shift {precision}: {WIDE.name}" for precision in ("bf16", "tf32", "ieee")),
    f"gram_shift_tma bf16: {WIDE.name}",
    *(f"gram_direct {precision}: {STEM.name}" for precision in ("bf16", "tf32", "ieee")),
    *(f"decor_stats {precision}: {SHORTEST.name}" for precision in ("tf32", "ieee")),
    *(f"symmetric_update {precision}: 1 of D 576" for precision in ("tf32x3", "tf32", "ieee")),
    "product tf32x3: 4 of 1152x1152x1152",
)
_QUICK = (
    f"gram_shift bf16: {LAYERS[0].name}",
    f"gram_shift bf16: {WIDE.name}",
    f"gram_shift_tma bf16: {WIDE.name}",
    f"gram_direct bf16: {STEM.name}",
    f"decor_stats tf32: {SHORT[1].name}",
    "symmetric_update tf32x3: 1 of D 576",
    "product tf32x3: 4 of 1152x1152x1152",
)


def _triton() -> Iterator[Problem]:
    statistics = [tune.stats_shape(SHORTEST, precision) for precision in ("tf32", "ieee")]
    shapes = {shape.name: shape for shape in (*tune.shapes(), *statistics)}
    for name in (*_CHOSEN, *_ALL):
        shape = shapes[name]
        form = shape.kernel.removeprefix("gram_").removeprefix("shift_")
        calls = partial(_tuned, shape, name in _ALL)
        quick = name in _QUICK
        yield Problem("triton", shape.precision, f"{form} {shape.label}", calls, quick)
    yield from _copies("triton", _triton_pack)


def _tuned(shape: tune.Shape, every: bool, target: int) -> Iterator[Call]:
    problem = shape.make(CPU)
    if problem is None:
        return
    if shape.kernel != "product":  # of which the library may be the choice, on this CPU for long
        yield Call(partial(problem.run, None))
    for config in problem.candidates if every else ():
        yield Call(partial(problem.run, config), shape.kernel)


def _triton_pack(x: Tensor) -> Tensor:
    from dbp_kernels.backends.triton.pack import pack  # Triton may not be there

    return pack(x)
