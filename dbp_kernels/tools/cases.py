"""Layer inputs to measure on: a convolution's or linear layer's input and window, and ResNets' layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import reference
from dbp_kernels.planning.geometry import ConvGeometry, make_geometry

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A convolution's (or linear layer's) input and window.

    Attributes:
        name: unique and readable, see :func:`make_name`.
        N, C, H, W: input shape. Linear: N rows of C features, H = W = 1.
        kernel: (KH, KW), or () for a linear layer.
        stride, padding, dilation: per axis (rows, columns).
        groups: channel groups.
        tags: networks and roles by which cases are selected, e.g. "resnet18".
    """

    name: str
    N: int
    C: int
    H: int
    W: int
    kernel: tuple[int, ...]
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    tags: tuple[str, ...]

    @property
    def is_linear(self) -> bool:
        return not self.kernel

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C) for a linear layer, else (N, C, H, W)."""
        return (self.N, self.C) if self.is_linear else (self.N, self.C, self.H, self.W)

    @property
    def output_size(self) -> Pair:
        """(OH, OW): patch positions per axis."""
        if self.is_linear:
            return (1, 1)
        oh, ow = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip(
                (self.H, self.W), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return oh, ow

    @property
    def window(self) -> tuple[Any, ...]:
        """(kernel, stride, padding, dilation, groups) as the operators take them."""
        lists = (self.kernel, self.stride, self.padding, self.dilation)
        return (*(() if self.is_linear else v for v in lists), self.groups)

    @property
    def geometry(self) -> ConvGeometry:
        """What the planner and the kernels are asked with."""
        return make_geometry(self.input_shape, *self.window)

    @property
    def D(self) -> int:
        """Entries of a patch of one group."""
        taps = 1
        for k in self.kernel:
            taps *= k
        return self.C // self.groups * taps

    @property
    def n(self) -> int:
        """Number of patches."""
        oh, ow = self.output_size
        return self.N * oh * ow

    @property
    def input_elements(self) -> int:
        return self.N * self.C * self.H * self.W

    @property
    def result_elements(self) -> int:
        """Entries of S: groups * D^2."""
        return self.groups * self.D**2


def make_name(
    N: int,
    C: int,
    H: int,
    W: int,
    kernel: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> str:
    """E.g. "3x3 64@56 b32", "7x7 s2 3@224 b32", "3x3 g32 128@56 b32", "linear 512 b32".

    Stride, dilation and groups appear when they are not 1, padding when it is not the customary
    half kernel, and both axes where they differ.
    """
    if not kernel:
        return f"linear {C} b{N}"

    def pair(values: Pair) -> str:
        return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"

    parts = ["x".join(map(str, kernel))]
    if stride != (1, 1):
        parts.append(f"s{pair(stride)}")
    if padding != tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)):
        parts.append(f"p{pair(padding)}")
    if dilation != (1, 1):
        parts.append(f"d{pair(dilation)}")
    if groups != 1:
        parts.append(f"g{groups}")
    return " ".join([*parts, f"{C}@{pair((H, W))}", f"b{N}"])


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def conv(
    N: int,
    C: int,
    size: int | Pair,
    kernel: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
    groups: int = 1,
    tags: Iterable[str] = (),
) -> Case:
    """A convolution's case; ``padding=None`` is the customary half kernel."""
    (h, w), k, s, d = _pair(size), _pair(kernel), _pair(stride), _pair(dilation)
    half = (d[0] * (k[0] - 1) // 2, d[1] * (k[1] - 1) // 2)
    p = half if padding is None else _pair(padding)
    if C % groups:
        raise ValueError(f"C must be divisible by groups, got C={C}, groups={groups}")
    return Case(
        make_name(N, C, h, w, k, s, p, d, groups), N, C, h, w, k, s, p, d, groups, tuple(tags)
    )


def linear(N: int, features: int, tags: Iterable[str] = ()) -> Case:
    """The case of a linear layer that sees N rows of ``features`` numbers."""
    one = (1, 1)
    name = make_name(N, features, 1, 1, (), one, (0, 0), one, 1)
    return Case(name, N, features, 1, 1, (), one, (0, 0), one, 1, tuple(tags))


def with_batch(case: Case, N: int) -> Case:
    """The same layer with another batch size, renamed."""
    if N < 1:
        raise ValueError(f"batch must be at least 1, got {N}")
    name = make_name(
        N,
        case.C,
        case.H,
        case.W,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
    )
    return replace(case, N=N, name=name)


_R18, _R34, _R50 = "resnet18", "resnet34", "resnet50"
_BASIC = (_R18, _R34)
_ALL = (_R18, _R34, _R50)


def resnets(N: int = 32) -> list[Case]:
    """Every distinct layer of ResNet-18/34/50 at 224x224 (stride in the bottleneck's 3x3)."""
    cases = [conv(N, 3, 224, 7, stride=2, tags=(*_ALL, "stem", "core"))]
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        cases.append(conv(N, channels, size, 3, tags=(*_ALL, "core")))
    for channels, size in ((64, 56), (128, 28), (256, 14)):  # entering the next stage
        cases.append(conv(N, channels, size, 3, stride=2, tags=_BASIC))
        cases.append(conv(N, channels, size, 1, stride=2, tags=_BASIC))
    for channels, size in ((128, 56), (256, 28), (512, 14)):
        cases.append(conv(N, channels, size, 3, stride=2, tags=(_R50,)))
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):  # a bottleneck's last 1x1
        cases.append(conv(N, channels, size, 1, tags=(_R50,)))
    for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7)):  # its first 1x1
        cases.append(conv(N, channels, size, 1, tags=(_R50,)))
    for channels, size in ((256, 56), (512, 28), (1024, 14)):  # its strided shortcut
        cases.append(conv(N, channels, size, 1, stride=2, tags=(_R50,)))
    return [*cases, linear(N, 512, _BASIC), linear(N, 2048, (_R50,))]


def random_input(
    case: Case, device: torch.device, dtype: torch.dtype, channels_last: bool = False
) -> Tensor:
    """Random normal data, the same in every run on a type of device."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.input_shape, generator=generator, device=device).to(dtype)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


_CHUNK_BYTES = 2**29


def oracle(x: Tensor, case: Case) -> Tensor:
    """S in float64, (groups, D, D), by the library's definition, in chunks of images."""
    per_image = max(1, 8 * case.n // case.N * case.groups * case.D)
    images = max(1, _CHUNK_BYTES // per_image)
    geometry = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
    total = x.new_zeros((case.groups, case.D, case.D), dtype=torch.float64)
    for chunk in x.split(images):
        total += reference.patch_gram(chunk.double(), *geometry) * chunk.shape[0]
    return total / x.shape[0]


def error(result: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest entry; infinite for a wrong shape or non-finite ones."""
    if result.shape != exact.shape:
        return float("inf")
    worst = (result.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
    return float(torch.nan_to_num(worst, nan=float("inf"), posinf=float("inf")))
