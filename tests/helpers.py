"""What several test files share: random convolutions, input layouts, the error measure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dbp_kernels import ops
from dbp_kernels.backends.triton import runtime
from dbp_kernels.choose import update_choices
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry, make_geometry
from dbp_kernels.planning.planner import gram_choices
from dbp_kernels.rules import UpdateRule

# Where tests of kernels put their tensors: interpreted kernels take CPU tensors.
DEVICE = torch.device("cpu" if runtime.INTERPRET or not torch.cuda.is_available() else "cuda")
LAYOUTS = ("contiguous", "channels_last", "rows", "reversed", "sliced", "expanded", "offset")


@dataclass(frozen=True)
class Case:
    """An input shape and the arguments of an op on its patches."""

    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        # without a kernel the rows are the patches, and ``size`` counts more rows
        if not self.kernel:
            return (self.batch, *self.size, self.channels)
        return (self.batch, self.channels, *self.size)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        return (
            list(self.kernel),
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.groups,
        )

    @property
    def geometry(self) -> ConvGeometry:
        return make_geometry(self.shape, *self.arguments)

    def input(self, dtype=torch.float64, seed: int = 0, layout: str = "contiguous") -> Tensor:
        return strided(random(self.shape, dtype, seed), layout)

    def R(self, dtype=torch.float64, seed: int = 1, flat: bool = False) -> Tensor:
        """Near the identity, but no symmetry to hide a transposition behind."""
        d = self.geometry.dim
        R = torch.eye(d, dtype=dtype) + random((self.groups, d, d), dtype, seed) / max(1, d) ** 0.5
        return R[0] if flat and self.groups == 1 else R


def case(batch, channels, size, kernel, stride=1, padding=0, dilation=1, groups=1) -> Case:
    """A Case from ints or tuples."""
    size = tuple(size)

    def each(v):
        return tuple(v) if isinstance(v, tuple | list) else (v,) * len(size)

    return Case(
        batch, channels, size, each(kernel), each(stride), each(padding), each(dilation), groups
    )


def rows(shape, groups=1) -> Case:
    """The case of a linear layer: kernel_size []."""
    *lead, channels = shape
    return Case(lead[0], channels, tuple(lead[1:]), (), (), (), (), groups)


def random(shape, dtype=torch.float64, seed: int = 0) -> Tensor:
    """Not zero-mean, so that means and moments differ; rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values (except "expanded") with other strides; x has at least 2 dimensions."""
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "rows":  # channels last, each row with room for more, which may hold anything
        room = -x.shape[1] % 8 + 8
        shape = (x.shape[0], *x.shape[2:], x.shape[1] + room)
        big = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        return big[..., : x.shape[1]].movedim(-1, 1).copy_(x)
    if layout == "reversed":  # strides ascending instead of descending
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":  # every second element of every dimension of a larger tensor
        big = torch.full([2 * s + 1 for s in x.shape], float("nan"), dtype=x.dtype)
        view = big[tuple(slice(1, 2 * s + 1, 2) for s in x.shape)]
        return view.copy_(x)
    if layout == "expanded":  # one image, repeated with stride 0
        return x[:1].expand(x.shape)
    if layout == "offset":  # contiguous, but not at the start of its memory
        big = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
        return big[3:].view(x.shape).copy_(x)
    raise ValueError(layout)


@st.composite
def cases(draw, dims=(1, 2, 3), min_batch=1, max_batch=3, max_groups=3, max_channels=3) -> Case:
    """Convolutions whose kernel fits the padded input, often only just."""
    count = draw(st.sampled_from(dims))
    kernel_limit, slack = {1: (6, 9), 2: (4, 5), 3: (3, 2)}[count]
    columns = []
    for _ in range(count):
        kernel = draw(st.integers(1, kernel_limit))
        dilation = draw(st.integers(1, 3))
        padding = draw(st.integers(0, 4))
        least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        size = least + draw(st.integers(0, slack))
        columns.append((size, kernel, draw(st.integers(1, 3)), padding, dilation))
    groups = draw(st.integers(1, max_groups))
    return Case(
        draw(st.integers(min_batch, max_batch)),
        groups * draw(st.integers(1, max_channels)),
        *zip(*columns),
        groups,
    )


def algorithms(geometry: ConvGeometry) -> list[Choice]:
    """Every way to compute S: all the planner offers, and what it left out as hopeless."""
    dims = len(geometry.axes)
    ways = {("unfold", ())}
    if dims:
        masks = itertools.product((False, True), repeat=dims)
        ways |= {("shift", mask) for mask in masks if not all(mask)}
        ways.add(("self_wgrad", ()))
    ways |= {(choice.name, choice.unfolded) for choice in gram_choices(geometry)}
    return [Choice(name, 0.0, 0.0, unfolded) for name, unfolded in sorted(ways)]


def moment_error(S: Tensor, oracle: Tensor) -> float:
    """max |S - oracle|_ij / sqrt(oracle_ii oracle_jj): every entry against its own natural size.

    Entries of taps that read padding everywhere must be exactly zero. NaN counts as infinite.
    """
    assert S.shape == oracle.shape
    if not S.numel():
        return 0.0
    scale = oracle.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    difference = (S.double() - oracle).abs()
    error = torch.where(difference == 0, 0.0, difference / scale)
    return error.nan_to_num(nan=float("inf")).max().item()


def error(result: Tensor, oracle: Tensor) -> float:
    """max |result - oracle| / max |oracle|; NaN counts as infinite."""
    assert result.shape == oracle.shape
    if not result.numel():
        return 0.0
    difference = (result.double() - oracle.double()).abs().max()
    scale = oracle.double().abs().max()
    return (difference / scale if difference else difference).nan_to_num(nan=float("inf")).item()


def updated(
    backend, x: Tensor, R: Tensor, geometry, lr: float, kappa: float, rule: str, *arguments
) -> tuple[Tensor, Tensor]:
    """(R_new, loss) by a backend's ``decor_update``, which stops short of changing R."""
    weights = UpdateRule.make(rule, kappa, geometry.dim)
    update = backend.decor_update(x, R, geometry, weights, *arguments)
    return update.new(R, lr), update.loss


def products_of_change(samples: int, dim: int) -> int:
    """How many products form M' R in the plan chosen for a linear layer's float32 update.

    With them the one that only the loss of plan "samples" comes from.
    """
    choice = update_choices(rows((samples, dim)).geometry, "cpu", torch.float32)[0]
    return 3 if choice.name == "samples" else 1


class Products(TorchDispatchMode):
    """Within it ``seen`` collects the precision of float32 on CUDA at every matrix product."""

    _NAMES = ("mm", "bmm", "addmm", "baddbmm", "_linear_pointwise")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "dbp":  # opaque: to be looked into
            with self:
                return getattr(ops, name)(*args, **(kwargs or {}))
        if name.rstrip("_") in self._NAMES:
            setting = torch.backends.cuda.matmul.fp32_precision
            self.seen.append("ieee" if setting == "none" else setting)  # that is what it means
        return func(*args, **(kwargs or {}))
