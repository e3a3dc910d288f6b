"""The cost model: which algorithm computes S, which plan computes the update, and why.

Costs are seconds from a device's figures (``calibration.Machine``): operations at a rate that depends
on how thin the matrices are, elements packed and assembled at what each kind of copy costs, and a
fixed overhead for every call. Only the order of the candidates matters. Everything here is integers
and floats; no tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from dbp_kernels.planning.calibration import Machine, calibration, cost_at
from dbp_kernels.planning.calibration import machine as machine
from dbp_kernels.planning.choice import KERNEL_BACKENDS, PLANS, PRECISIONS, Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.layout import (
    ONEDNN_WORTH,
    WGRAD_POSITIONS,
    images_per_chunk,
    panels,
    shift_layout,
    wgrad_convolutions,
)
from dbp_kernels.planning.work import MAX_PIXELS


def _half(per_axis: list[int], self_inverse: list[int]) -> float:
    """How many of the combinations remain when a combination and its transpose count once."""
    return (math.prod(per_axis) + math.prod(self_inverse)) / 2


def _copy_kind(unfolded: tuple[bool, ...]) -> int:
    """Index into the figures of copies: no axis unfolded, the last one, or another."""
    return 0 if not any(unfolded) else 1 if unfolded[-1] else 2


# A line of a CPU's first cache in bytes, its sets and their ways: of nearly all CPUs, or less.
_LINE, _SETS, _WAYS = 64, 64, 8


def _aliased(geometry: ConvGeometry, size: int) -> bool:
    """Whether the channels of one pixel, an image's size apart, compete for few cache sets."""
    apart = size * math.prod(a.size for a in geometry.axes)
    sets = _SETS * _LINE // math.gcd(max(apart, _LINE), _SETS * _LINE)
    return geometry.channels > _WAYS * min(sets, _SETS)


# C libraries keep freed memory for the next buffer up to this size (glibc); larger ones are new.
_KEPT = 32 << 20


def _fresh(elements: float, m: Machine, size: int) -> float:
    """ns per element of a buffer for being new memory."""
    return m.fresh if elements * size > _KEPT else 0.0


def _pack_cost(geometry: ConvGeometry, kind: int, m: Machine, size: int, elements: float) -> float:
    """ns per float32 element of a packed buffer of so many."""
    with_stride = geometry.strided
    if geometry.group_channels * size < _LINE:
        return cost_at((m.pack_stem if with_stride else m.pack_thin)[kind], elements)
    cost = cost_at((m.pack_strided if with_stride else m.pack)[kind], elements)
    return cost * (m.aliased[kind] if _aliased(geometry, size) else 1)


def _parts(geometry: ConvGeometry, expansion: float, inputs: float, device_type: str) -> float:
    """How many parts ``images_per_chunk`` makes; the last one counts by its images."""
    images = images_per_chunk(geometry, expansion, inputs, device_type)
    return max(1.0, geometry.batch / max(1, images))


def _shift_cost(
    geometry: ConvGeometry, unfolded: tuple[bool, ...], m: Machine, size: int, device_type: str
) -> Choice:
    layout = shift_layout(geometry, unfolded)
    counts = [a.counts for a in layout.shifted]
    self_inverse = [c.self_classes for c in counts]
    block = geometry.groups * layout.side**2
    flop = 2.0 * _half([c.classes for c in counts], self_inverse) * block * layout.rows
    elements = geometry.input_numel * layout.expansion
    kind = _copy_kind(unfolded)
    result = geometry.groups * geometry.dim**2
    parts = _parts(geometry, layout.expansion, 2, device_type)
    seconds = flop / m.product_rate(layout.side, geometry.groups)
    seconds += _copying(elements, _pack_cost(geometry, kind, m, size, elements / parts), size)
    seconds += _copying(result, m.assemble[kind] + _fresh(result, m, size), size)
    # columns copied out, blocks added to
    blocks = _half([c.windows for c in counts], self_inverse)
    moved = 2 * layout.copies * elements + 4 * blocks * block
    seconds += size * moved / m.bytes_per_second()
    products = _half([c.segments for c in counts], [c.self_segments for c in counts])
    seconds += products * parts * m.product_call + m.shift_call
    return Choice("shift", flop / 1e9, seconds, unfolded)


def _copying(elements: float, cost: float, size: int) -> float:
    """Seconds of a copy that costs so many ns per float32 element."""
    return elements * cost * 1e-9 * size / 4


_WGRAD_TAPS = 25  # of the weights whose gradients calibrations time


def _self_wgrad_cost(geometry: ConvGeometry, m: Machine, size: int) -> Choice:
    taps = math.prod(2 * a.kernel - 1 for a in geometry.axes)
    phases = math.prod(a.phase_count for a in geometry.axes)
    lattice = geometry.input_numel / geometry.channels / math.prod(a.stride for a in geometry.axes)
    flop = 2.0 * phases * lattice * geometry.channels * geometry.group_channels * taps
    segments = wgrad_convolutions(geometry)
    pieces = segments + phases * geometry.samples / WGRAD_POSITIONS
    # a weight gradient is some calls' worth of set-up
    calls = 30 * pieces + 3 * geometry.taps * segments / phases
    # the input has zeros around it, as far as its taps are apart
    padded = math.prod((a.size + 2 * (a.span - 1)) / a.size for a in geometry.axes)
    moved = size * ((3 + padded) * geometry.input_numel + 2 * geometry.groups * geometry.dim**2)
    # rates are of 5x5 weights; libraries' larger ones are several times slower by the operation
    seconds = flop / m.wgrad_rate(geometry.group_channels) * max(1.0, taps / _WGRAD_TAPS)
    weights = geometry.channels * geometry.group_channels * taps
    seconds += _copying(segments * weights, m.wgrad_weight, size)
    return Choice("self_wgrad", flop / 1e9, seconds + moved / m.bytes_per_second() + calls * m.call)


def _upper(count: int) -> float:
    """The part of a symmetric product's operations that is left when it is cut into panels."""
    return (count + 1) / (2 * count)


def _panels(dim: int, rows: int, device_type: str, backend: str) -> int:
    """Those of an update's symmetric product; Triton's kernel for it leaves out lower tiles itself."""
    return panels(dim, rows, device_type == "cuda" and backend != "triton")


def _im2col_seconds(geometry: ConvGeometry, m: Machine, size: int, parts: float = 1) -> float:
    """Seconds of all patches as rows, in so many parts."""
    elements = geometry.patch_numel
    table = m.im2col_strided if geometry.strided else m.im2col
    return _copying(elements, cost_at(table, elements / parts), size)


def _operand_size(size: int, precision: str) -> int:
    """Bytes of an input's element, where ``size`` are those of the accumulation."""
    return 2 if precision in ("bf16", "fp16") else size


def _unfold_cost(
    geometry: ConvGeometry, m: Machine, size: int, device_type: str, precision: str
) -> Choice:
    n, d = geometry.samples, geometry.dim
    count = panels(d, n, device_type == "cuda")
    flop = 2.0 * geometry.groups * n * d**2 * _upper(count)
    result = geometry.groups * d**2
    seconds = flop / m.product_rate(max(1, d // count), geometry.groups)  # a panel's side
    if not geometry.pointwise:
        seconds += m.unfold_call
    elif device_type == "cuda":
        # a product of each panel, scaled (of half precision) and mirrored
        seconds += count * m.product_call + (2 * count - 1) * m.call
        read = _operand_size(size, precision) * geometry.input_numel
        seconds += read / m.bytes_per_second()
    else:
        seconds += 4 * m.call
    seconds += size * 2 * result / m.bytes_per_second()
    seconds += _copying(result, _fresh(result, m, size), size)
    if not geometry.pointwise:
        parts = _parts(geometry, geometry.expansion, 1, device_type)
        seconds += _im2col_seconds(geometry, m, size, parts)
    return Choice("unfold", flop / 1e9, seconds)


def _tiles(side: int, smallest: int = 16, largest: int = 128) -> tuple[int, int]:
    """(padded side, tiles along it) of the GPU kernels' square output tiles."""
    tile = min(largest, max(smallest, 1 << (side - 1).bit_length()))
    count = -(-side // tile)
    return count * tile, count


def _kernel_shift_cost(
    geometry: ConvGeometry, m: Machine, size: int, name: str, precision: str
) -> Choice:
    """Products of boxes of pixels: no mask at borders, only the upper tiles of a shift of zero."""
    sm90 = name == "cuda_sm90"
    side, count = _tiles(geometry.group_channels, *((64, 64) if sm90 else ()))
    counts = [axis.counts for axis in geometry.axes]
    pixels, self_pixels = [c.pixels for c in counts], [c.self_pixels for c in counts]
    products = (math.prod(pixels) + math.prod(self_pixels) / count) / 2
    flop = 2.0 * geometry.groups * side**2 * geometry.batch * products
    boxes = _half([c.segments for c in counts], [c.self_segments for c in counts])
    block = geometry.groups * side**2
    moved: float = 3 * _operand_size(size, precision) * geometry.input_numel
    moved += 2 * size * geometry.groups * geometry.dim**2
    moved += 2 * 4 * boxes * block  # partial sums, written and read
    seconds = flop / m.kernel_rate(side, sm90)
    seconds += moved / m.bytes_per_second() + 3 * m.call
    return Choice(name, flop / 1e9, seconds)


def _kernel_direct_cost(
    geometry: ConvGeometry, m: Machine, size: int, name: str, precision: str
) -> Choice:
    """The upper tiles of Z^T Z, its columns gathered from the input."""
    sm90 = name == "cuda_sm90"
    side, count = _tiles(geometry.dim, *((128, 128) if sm90 else ()))
    flop = geometry.groups * geometry.samples * side**2 * (1 + 1 / count)
    moved = 2 * _operand_size(size, precision) * geometry.input_numel
    moved += 2 * size * geometry.groups * geometry.dim**2
    rate = m.kernel_rate(min(side, 128), sm90) * (1 if geometry.pointwise else m.gather)
    seconds = flop / rate + moved / m.bytes_per_second() + 2 * m.call
    return Choice(name, flop / 1e9, seconds)


def _numbered(geometry: ConvGeometry) -> bool:
    """Whether kernels can number pixels and patches, and say where they are, all in 32 bits."""
    pixels = geometry.input_numel // max(1, geometry.channels)
    places = (max(a.size + 2 * a.padding, a.stride) for a in geometry.axes)
    return max(pixels, geometry.samples, *places) <= MAX_PIXELS


def _sm90_cost(geometry: ConvGeometry, m: Machine, size: int, name: str, precision: str) -> Choice:
    cost = _kernel_direct_cost if geometry.pointwise else _kernel_shift_cost
    return cost(geometry, m, size, name, precision)


@dataclass(frozen=True)
class _Kernels:
    """Kernels of a backend's own for S: what they cost, and what they cover."""

    cost: Callable[[ConvGeometry, Machine, int, str, str], Choice]
    pointwise: bool = True
    strided: bool = True
    precisions: tuple[str, ...] = PRECISIONS
    sm90: bool = False  # for GPUs of compute capability 9.0 only
    gathers: bool = False  # patches of several pixels, from wherever they lie

    def cover(self, geometry: ConvGeometry, precision: str, sm90: bool) -> bool:
        """Whether they are for such an input, on such a GPU."""
        return (
            (self.pointwise or not geometry.pointwise)
            and (self.strided or not geometry.strided)
            and precision in self.precisions
            and (sm90 or not self.sm90)
        )


# By name, which begins with the backend's; the backend has a table of the same names.
_KERNELS = {
    "triton_shift": _Kernels(_kernel_shift_cost, pointwise=False),
    "triton_direct": _Kernels(_kernel_direct_cost, gathers=True),
    "cuda_shift": _Kernels(_kernel_shift_cost, pointwise=False),
    "cuda_direct": _Kernels(_kernel_direct_cost, gathers=True),
    "cuda_sm90": _Kernels(_sm90_cost, strided=False, precisions=("bf16", "fp16"), sm90=True),
}
ALGORITHMS = ("shift", "self_wgrad", "unfold", *_KERNELS)


def reads_rows(algorithm: str, geometry: ConvGeometry) -> bool:
    """Whether it wants the input as rows of channels, and copies what is not."""
    kernels = _KERNELS.get(algorithm)
    return kernels is not None and (geometry.pointwise or not kernels.gathers)


@lru_cache(maxsize=1024)
def gram_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
    float32: str = "ieee",
    sm90: bool = False,
) -> tuple[Choice, ...]:
    """The algorithms for S = patch_gram of this geometry, cheapest first.

    ``itemsize`` is that of the accumulation, ``precision`` that of the operands and ``float32`` what
    it is where they are made float32. Backends with kernels have their own algorithms beside the
    libraries'. ``sm90``: there is a GPU of compute capability 9.0, and kernels for it were compiled.
    """
    m = machine(device_type, precision, itemsize)
    choices = [_unfold_cost(geometry, m, itemsize, device_type, precision)]
    countable = all(axis.countable for axis in geometry.axes)
    if countable and not geometry.pointwise:
        for unfolded in itertools.product((False, True), repeat=len(geometry.axes)):
            if not all(unfolded):
                choices.append(_shift_cost(geometry, unfolded, m, itemsize, device_type))
        convolving = machine(device_type, float32, itemsize)
        choices.append(_self_wgrad_cost(geometry, convolving, itemsize))
    if _numbered(geometry):
        choices += [
            kernels.cost(geometry, m, itemsize, name, precision)
            for name, kernels in _KERNELS.items()
            if name.partition("_")[0] == backend
            and kernels.cover(geometry, precision, sm90)
            and (countable or kernels.gathers)
        ]
    return tuple(sorted(choices, key=lambda c: c.seconds))


def _dense_rate(m: Machine, side: int, dim: int, groups: int, blas: bool = False) -> float:
    """Operations per second of products with R (dim x dim), their shorter side given."""
    blas = blas or not m.onednn_pays or side * dim**2 < ONEDNN_WORTH
    # square products by BLAS run at the rate of those with a long inner dimension
    narrow = groups == 1 and (side < dim or not blas)
    return m.narrow_rate(side, blas) if narrow else m.product_rate(side, groups)


@lru_cache(maxsize=1024)
def update_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
    float32: str = "ieee",
    products: tuple[str, str] | None = None,
    sm90: bool = False,
) -> tuple[Choice, ...]:
    """The plans for one update of R from this geometry's samples, cheapest first.

    Plan "samples" is left out for n > D, where its loss would lose its digits. ``products`` are the
    precisions of what forms M = R S R^T and of what changes R, M' R (None: both as ``float32``); the
    rest as in ``gram_choices``.
    """
    form, change = products or (float32, float32)
    m, at_last = machine(device_type, form, itemsize), machine(device_type, change, itemsize)
    n, d, g = geometry.samples, geometry.dim, geometry.groups
    gram = gram_choices(geometry, device_type, itemsize, backend, precision, float32, sm90)[0]
    bandwidth = m.bytes_per_second()
    square = itemsize * g * d * d

    def plan(name: str, squares: float, *products: tuple[float, float]) -> Choice:
        """From D x D matrices read or written, and (operations, rate) of products."""
        flop = sum(f for f, _ in products)
        seconds = sum(f / rate for f, rate in products)
        seconds += squares * square / bandwidth + m.plan_call[PLANS.index(name)]
        return Choice(name, flop / 1e9, seconds)

    few = min(n, d)
    upper = _upper(_panels(d, few, device_type, backend))
    copied = 0.0 if geometry.pointwise else _im2col_seconds(geometry, m, itemsize)
    if backend in KERNEL_BACKENDS:  # the products of a GPU do not hide writing and reading Z and X
        copied += 5 * itemsize * n * d * g / bandwidth
    whole, part = 2.0 * g * d**3, 2.0 * g * n * d**2  # D x D by D x D, and n x D by D x D
    thin = _dense_rate(m, few, d, g)
    last = whole, _dense_rate(at_last, d, d, g)
    base = plan("gram", 8, (whole * (1 + upper), _dense_rate(m, d, d, g)), last)
    direct = plan("direct", 6, (part * (1 + upper), thin), last)
    samples = plan(
        "samples",
        4,
        (part + 2.0 * g * n**2 * d, thin),
        (part, _dense_rate(at_last, few, d, g)),
        (part, _dense_rate(at_last, few, d, g, blas=True)),  # added to R in place
    )
    choices = [
        Choice("gram", base.gflop + gram.gflop, base.seconds + gram.seconds, gram=gram),
        Choice("direct", direct.gflop, direct.seconds + copied),
    ]
    if n <= d:
        choices.append(Choice("samples", samples.gflop, samples.seconds + copied))
    return tuple(sorted(choices, key=lambda c: c.seconds))


@lru_cache(maxsize=1024)
def stats_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
    float32: str = "ieee",
    sm90: bool = False,
) -> tuple[Choice, ...]:
    """The ways to C and V, cheapest first; arguments as of ``update_choices``.

    "fused" belongs to backends with kernels of their own, and to a D that such a kernel holds:
    whether it does only the backend knows.
    """
    m = machine(device_type, float32, itemsize)
    n, d, g = geometry.samples, geometry.dim, geometry.groups
    gram = gram_choices(geometry, device_type, itemsize, backend, precision, float32, sm90)[0]
    bandwidth = m.bytes_per_second()
    upper = _upper(_panels(d, min(n, d), device_type, backend))
    # P = R S, half of P R^T, and both read and written
    flop = 2.0 * g * d**3 * (1 + upper)
    seconds = flop / _dense_rate(m, d, d, g) + 6 * itemsize * g * d * d / bandwidth + 4 * m.call
    choices = [Choice("gram", flop / 1e9 + gram.gflop, seconds + gram.seconds, gram=gram)]
    # Z and X = Z R^T written and read
    flop = 2.0 * g * n * d**2 * (1 + upper)
    moved = itemsize * g * (8 * n * d + 3 * d * d)
    seconds = flop / _dense_rate(m, min(n, d), d, g) + moved / bandwidth + 5 * m.call
    choices.append(Choice("direct", flop / 1e9, seconds))
    if backend in KERNEL_BACKENDS:
        side, _ = _tiles(d)
        flop = 4.0 * g * n * side**2
        rate = m.kernel_rate(min(side, 128)) * m.gather
        moved = itemsize * (geometry.input_numel + 2 * g * d * d)
        choices.append(Choice("fused", flop / 1e9, flop / rate + moved / bandwidth + 2 * m.call))
    return tuple(sorted(choices, key=lambda c: c.seconds))


def reset() -> None:
    """Forgets all answers and calibrations, so that the next question reads DBP_CALIBRATION anew."""
    for cached in (gram_choices, update_choices, stats_choices, machine, calibration):
        cached.cache_clear()
