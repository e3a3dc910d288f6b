"""The cost model: which algorithm computes S, which plan computes the update, and why.

Costs are seconds from a handful of machine figures (``Machine``): operations at a rate that depends
on how thin the matrices are, bytes at the copy bandwidth, and a fixed overhead for every call. Only
the order of the candidates matters. Everything here is integers and floats; no tensors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

from .backends.eager import self_wgrad
from .backends.eager.matmul import panels
from .backends.eager.shift import shift_layout
from .geometry import Axis, ConvGeometry

PLANS = ("gram", "direct", "samples")
STATISTICS = ("fused", "gram", "direct")  # ways to C and V; "fused" is one kernel
KERNEL_BACKENDS = ("triton", "cuda")  # have a shift form and a direct form of their own
ALGORITHMS = (
    "shift",
    "self_wgrad",
    "unfold",
    *(f"{backend}_{form}" for backend in KERNEL_BACKENDS for form in ("shift", "direct")),
)
PRECISIONS = ("ieee", "tf32", "bf16", "fp16")  # of a product's operands; float32 is ieee or tf32


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a device.

    ``gflops``: float32 matmul rate on large matrices. ``thin``: points (side, fraction of it) for
    X^T Y with a long inner dimension, by the shorter side of the result. ``gbytes``: copy bandwidth
    in GB/s. ``call``: seconds per library call. ``wgrad``: points (channels per group, fraction of
    ``gflops``) for weight-gradient convolutions. ``tensor_cores``: rates in GFLOP/s that take the
    place of ``gflops`` for operands in other precisions.
    """

    name: str
    gflops: float
    gbytes: float
    call: float
    thin: tuple[tuple[int, float], ...]
    wgrad: tuple[tuple[int, float], ...]
    tensor_cores: tuple[tuple[str, float], ...] = ()

    def rate(self, side: int) -> float:
        """Operations per second of a product whose result's shorter side is ``side``."""
        return self.gflops * 1e9 * _interpolate(self.thin, side)

    def wgrad_rate(self, channels: int) -> float:
        """Operations per second of a weight-gradient convolution."""
        return self.gflops * 1e9 * _interpolate(self.wgrad, channels)


def _interpolate(points: tuple[tuple[int, float], ...], x: int) -> float:
    """Piecewise linear in log2(x); constant above the last point, towards zero below the first."""
    if x <= points[0][0]:
        return points[0][1] * x / points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * math.log2(x / x0) / math.log2(x1 / x0)
    return points[-1][1]


# CPU: two cores of an AMD EPYC (AVX2), MKL and oneDNN, float32. The GPU's figures are GUESSES from
# data sheets, for the Hopper generation, and not measured yet.
MACHINES = {
    "cpu": Machine(
        "cpu",
        gflops=130,
        gbytes=6,
        call=8e-6,
        thin=((3, 0.03), (9, 0.08), (21, 0.3), (32, 0.45), (64, 0.65), (128, 0.75), (256, 1.0)),
        wgrad=((3, 0.2), (16, 0.4), (64, 0.45)),
    ),
    "cuda": Machine(
        "cuda",
        gflops=50_000,
        gbytes=2000,
        call=5e-6,
        thin=((3, 0.01), (16, 0.05), (64, 0.2), (128, 0.4), (512, 1.0)),
        wgrad=((3, 0.02), (16, 0.1), (64, 0.3)),
        tensor_cores=(("tf32", 350_000), ("bf16", 700_000), ("fp16", 700_000)),
    ),
}


@lru_cache
def machine(device_type: str, precision: str = "ieee") -> Machine:
    """The figures for "cuda", or the CPU's for any other device type, at an operand precision."""
    m = MACHINES.get(device_type, MACHINES["cpu"])
    return replace(m, gflops=dict(m.tensor_cores).get(precision, m.gflops))


@dataclass(frozen=True)
class Choice:
    """One way to compute something, and what the model thinks it costs.

    ``unfolded`` belongs to the algorithm "shift": the axes whose taps become channels.
    """

    name: str
    gflop: float
    seconds: float
    unfolded: tuple[bool, ...] = ()
    gram: Choice | None = field(
        default=None, compare=False
    )  # of the plan "gram": how S is computed

    def __str__(self) -> str:
        name = self.name
        if any(self.unfolded):
            axes = ",".join(str(d) for d, u in enumerate(self.unfolded) if u)
            name += f"[unfold axis {axes}]"
        return f"{name} ({self.gram})" if self.gram else name


@lru_cache(maxsize=4096)
def _axis_counts(axis: Axis) -> tuple[int, int, int, int, int]:
    """Per axis: classes, self-inverse classes, segments of each, distinct windows."""
    classes = axis.pair_classes
    self_inverse = [c for c in classes if c.self_inverse]
    return (
        len(classes),
        len(self_inverse),
        sum(len(c.segments) for c in classes),
        sum(len(c.segments) for c in self_inverse),
        sum(len(c.windows) for c in classes),
    )


def _half(per_axis: list[int], self_inverse: list[int]) -> float:
    """How many of the combinations remain when a combination and its transpose count once."""
    return (math.prod(per_axis) + math.prod(self_inverse)) / 2


def _shift_cost(
    geometry: ConvGeometry, unfolded: tuple[bool, ...], m: Machine, size: int
) -> Choice:
    layout = shift_layout(geometry, unfolded)
    counts = [_axis_counts(a) for a in layout.shifted]
    classes, self_inverse, segments, self_segments, windows = (list(c) for c in zip(*counts))
    block = geometry.groups * layout.side**2
    flop = 2.0 * _half(classes, self_inverse) * block * layout.rows
    elements = geometry.input_numel * layout.expansion
    # slicing, multiplying and adding to blocks: about ten calls to a product
    calls = 10 * _half(segments, self_segments) * max(1.0, layout.expansion / 2)
    moved = size * (
        (3 + 2 * layout.copies) * elements
        + 4 * _half(windows, self_inverse) * block
        + 4 * geometry.groups * geometry.dim**2
    )
    seconds = flop / m.rate(layout.side) + moved / (m.gbytes * 1e9) + calls * m.call
    return Choice("shift", flop / 1e9, seconds, unfolded)


def _self_wgrad_cost(geometry: ConvGeometry, m: Machine, size: int) -> Choice:
    taps = math.prod(2 * a.kernel - 1 for a in geometry.axes)
    phases = math.prod(len(a.phases) for a in geometry.axes)
    lattice = geometry.input_numel / geometry.channels / math.prod(a.stride for a in geometry.axes)
    flop = 2.0 * phases * lattice * geometry.channels * geometry.group_channels * taps
    segments = self_wgrad.convolutions(geometry)
    pieces = segments + phases * geometry.samples / self_wgrad.POSITIONS
    # a weight gradient is some ten calls' worth of set-up
    calls = 10 * pieces + 2 * geometry.taps * segments / phases
    moved = size * (4 * geometry.input_numel + 2 * geometry.groups * geometry.dim**2)
    seconds = flop / m.wgrad_rate(geometry.group_channels)
    return Choice("self_wgrad", flop / 1e9, seconds + moved / (m.gbytes * 1e9) + calls * m.call)


def _upper(dim: int, rows: int) -> float:
    """The part of a symmetric product's operations that is left when it is cut into panels."""
    count = panels(dim, rows)
    return (count + 1) / (2 * count)


def _unfold_cost(geometry: ConvGeometry, m: Machine, size: int) -> Choice:
    n, d = geometry.samples, geometry.dim
    flop = 2.0 * geometry.groups * n * d**2 * _upper(d, n)
    copied = 0 if geometry.pointwise else 6 * geometry.samples * geometry.groups * geometry.dim
    moved = size * (copied + 2 * geometry.groups * geometry.dim**2)
    seconds = flop / m.rate(geometry.dim) + moved / (m.gbytes * 1e9) + 4 * m.call
    return Choice("unfold", flop / 1e9, seconds)


# GUESSES, not measured: fractions of the machine's matmul rate that our GPU kernels reach, by the
# channels of a group (rounded up to a tile), and what gathering taps costs beside reading rows.
_KERNEL_RATE = ((16, 0.03), (32, 0.12), (64, 0.35), (128, 0.6))
_GATHER = 0.6


def _tiles(side: int) -> tuple[int, int]:
    """(padded side, tiles along it) of the GPU kernels' square output tiles."""
    tile = min(128, max(16, 1 << (side - 1).bit_length()))
    count = -(-side // tile)
    return count * tile, count


def _kernel_shift_cost(geometry: ConvGeometry, m: Machine, size: int, backend: str) -> Choice:
    """Products of boxes of pixels: no mask at borders, only the upper tiles of a shift of zero."""
    side, count = _tiles(geometry.group_channels)
    pixels, self_pixels = [], []
    for axis in geometry.axes:
        lengths = [
            (sum(stop - start for start, stop in c.segments), c.self_inverse)
            for c in axis.pair_classes
        ]
        pixels.append(sum(n for n, _ in lengths))
        self_pixels.append(sum(n for n, self_inverse in lengths if self_inverse))
    products = (math.prod(pixels) + math.prod(self_pixels) / count) / 2
    flop = 2.0 * geometry.groups * side**2 * geometry.batch * products
    counts = [_axis_counts(axis) for axis in geometry.axes]
    boxes = _half([c[2] for c in counts], [c[3] for c in counts])
    block = geometry.groups * side**2
    moved = size * (3 * geometry.input_numel + 2 * geometry.groups * geometry.dim**2)
    moved += 2 * 4 * boxes * block  # partial sums, written and read
    seconds = flop / (m.gflops * 1e9 * _interpolate(_KERNEL_RATE, side))
    seconds += moved / (m.gbytes * 1e9) + 3 * m.call
    return Choice(f"{backend}_shift", flop / 1e9, seconds)


def _kernel_direct_cost(geometry: ConvGeometry, m: Machine, size: int, backend: str) -> Choice:
    """The upper tiles of Z^T Z, its columns gathered from the input."""
    side, count = _tiles(geometry.dim)
    flop = geometry.groups * geometry.samples * side**2 * (1 + 1 / count)
    moved = size * (2 * geometry.input_numel + 2 * geometry.groups * geometry.dim**2)
    rate = m.gflops * 1e9 * _interpolate(_KERNEL_RATE, min(side, 128))
    rate *= 1 if geometry.pointwise else _GATHER
    seconds = flop / rate + moved / (m.gbytes * 1e9) + 2 * m.call
    return Choice(f"{backend}_direct", flop / 1e9, seconds)


@lru_cache(maxsize=4096)
def gram_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
) -> tuple[Choice, ...]:
    """The algorithms for S = patch_gram of this geometry, cheapest first.

    ``itemsize`` is that of the accumulation, ``precision`` that of the operands. Backends with
    kernels have their own algorithms beside the libraries'.
    """
    m = machine(device_type, precision)
    choices = [_unfold_cost(geometry, m, itemsize)]
    if not geometry.pointwise:
        for unfolded in itertools.product((False, True), repeat=len(geometry.axes)):
            if not all(unfolded):
                choices.append(_shift_cost(geometry, unfolded, m, itemsize))
        choices.append(_self_wgrad_cost(geometry, m, itemsize))
    if backend in KERNEL_BACKENDS:
        choices.append(_kernel_direct_cost(geometry, m, itemsize, backend))
        if not geometry.pointwise:
            choices.append(_kernel_shift_cost(geometry, m, itemsize, backend))
    return tuple(sorted(choices, key=lambda c: c.seconds))


@lru_cache(maxsize=4096)
def update_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
    float32: str = "ieee",
) -> tuple[Choice, ...]:
    """The plans for one update of R from this geometry's samples, cheapest first.

    Plan "samples" is left out for n > D, where its loss would lose its digits. ``precision`` is
    that of S's operands, ``float32`` that of all other products; the rest as in ``gram_choices``.
    """
    m = machine(device_type, float32)
    n, d, g = geometry.samples, geometry.dim, geometry.groups
    gram = gram_choices(geometry, device_type, itemsize, backend, precision)[0]
    bandwidth = m.gbytes * 1e9
    square = itemsize * g * d * d

    def plan(name: str, flop: float, side: int, squares: float, **more: Choice) -> Choice:
        seconds = flop / m.rate(side) + squares * square / bandwidth + 8 * m.call
        return Choice(name, flop / 1e9, seconds, **more)

    upper = _upper(d, min(n, d))
    copied = 0.0 if geometry.pointwise else 6 * itemsize * n * d * g / bandwidth
    if backend in KERNEL_BACKENDS:  # the products of a GPU do not hide writing and reading Z and X
        copied += 5 * itemsize * n * d * g / bandwidth
    base = plan("gram", 2.0 * g * d**3 * (2 + upper), d, 8)
    direct = plan("direct", 2.0 * g * (n * d**2 * (1 + upper) + d**3), min(n, d), 6)
    samples = plan("samples", g * (6.0 * n * d**2 + 2.0 * n**2 * d), min(n, d), 4)
    choices = [
        Choice("gram", base.gflop + gram.gflop, base.seconds + gram.seconds, gram=gram),
        Choice("direct", direct.gflop, direct.seconds + copied),
    ]
    if n <= d:
        choices.append(Choice("samples", samples.gflop, samples.seconds + copied))
    return tuple(sorted(choices, key=lambda c: c.seconds))


@lru_cache(maxsize=4096)
def stats_choices(
    geometry: ConvGeometry,
    device_type: str = "cpu",
    itemsize: int = 4,
    backend: str = "eager",
    precision: str = "ieee",
    float32: str = "ieee",
) -> tuple[Choice, ...]:
    """The ways to C and V, cheapest first; arguments as of ``update_choices``.

    "fused" belongs to backends with kernels of their own, and to a D that such a kernel holds:
    whether it does only the backend knows.
    """
    m = machine(device_type, float32)
    n, d, g = geometry.samples, geometry.dim, geometry.groups
    gram = gram_choices(geometry, device_type, itemsize, backend, precision)[0]
    bandwidth = m.gbytes * 1e9
    upper = _upper(d, min(n, d))
    # P = R S, half of P R^T, and both read and written
    flop = 2.0 * g * d**3 * (1 + upper)
    seconds = flop / m.rate(d) + 6 * itemsize * g * d * d / bandwidth + 4 * m.call
    choices = [Choice("gram", flop / 1e9 + gram.gflop, seconds + gram.seconds, gram=gram)]
    # Z and X = Z R^T written and read
    flop = 2.0 * g * n * d**2 * (1 + upper)
    moved = itemsize * g * (8 * n * d + 3 * d * d)
    seconds = flop / m.rate(min(n, d)) + moved / bandwidth + 5 * m.call
    choices.append(Choice("direct", flop / 1e9, seconds))
    if backend in KERNEL_BACKENDS:
        side, _ = _tiles(d)
        flop = 4.0 * g * n * side**2
        rate = m.gflops * 1e9 * _interpolate(_KERNEL_RATE, min(side, 128)) * _GATHER
        moved = itemsize * (geometry.input_numel + 2 * g * d * d)
        choices.append(Choice("fused", flop / 1e9, flop / rate + moved / bandwidth + 2 * m.call))
    return tuple(sorted(choices, key=lambda c: c.seconds))
