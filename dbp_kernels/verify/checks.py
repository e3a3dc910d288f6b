"""What a check of one kernel is: a small problem, the kernel's answer, the float64 definition's.

Outputs and workspaces are filled with NaN first, so that an element nobody writes shows; the kernel
runs twice, since results that differ are a race. The problems are small: every tile of a
configuration is there with a tail, and the whole check takes milliseconds once it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import reference
from dbp_kernels.planning.geometry import ConvGeometry, make_geometry
from dbp_kernels.precision import products_in
from dbp_kernels.rules import UpdateRule

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "tf32x3": torch.float32,
    "ieee": torch.float32,
}
# Half-precision products are exact and summed in float32; tf32 keeps 10 bits of each operand, three
# products of it what float32 keeps.
BOUNDS = {"bf16": 2e-5, "fp16": 2e-5, "tf32": 4e-3, "tf32x3": 2e-5, "ieee": 2e-5}
REPEATS = 2
RULE = UpdateRule(0.7, 0.4, 0.3, 1.0)  # of checks of the update's epilogue


@dataclass(frozen=True)
class Problem:
    """An input and a convolution; ``kernel`` () is a linear layer, whose rows are the patches."""

    label: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channels_last: bool = True

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        """As ops take them."""
        kernel, stride, padding, dilation = map(
            list, (self.kernel, self.stride, self.padding, self.dilation)
        )
        return kernel, stride, padding, dilation, self.groups

    @property
    def geometry(self) -> ConvGeometry:
        return make_geometry(self.shape, *self.arguments)

    def input(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random, with a mean, rounded to ``dtype``; the same everywhere."""
        x = (_random(self.shape, 0) + 0.3).to(dtype)
        if self.channels_last and self.kernel:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.to(device)

    def R(self, device: torch.device) -> Tensor:
        """(groups, D, D) float32 near the identity, without a symmetry that hides a transposition."""
        g = self.geometry
        noise: Tensor = _random((g.groups, g.dim, g.dim), 1) / g.dim**0.5
        return (torch.eye(g.dim) + noise).float().to(device)


def convolution(
    label: str,
    shape: tuple[int, ...],
    kernel: int | tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    channels_last: bool = True,
) -> Problem:
    """A Problem of (N, C, *spatial), undilated, from ints or a tuple of the kernel's sides."""
    axes = len(shape) - 2
    sides = (kernel,) * axes if isinstance(kernel, int) else kernel
    each = ((stride,) * axes, (padding,) * axes, (1,) * axes)
    return Problem(label, shape, sides, *each, groups, channels_last)


@dataclass(frozen=True)
class Check:
    """One kernel in one configuration on one problem.

    Attributes:
        family: "triton" or "cuda", the backend.
        kernel: its name, e.g. "gram_shift".
        configuration: its tile, as text.
        precision: of the operands, a key of DTYPES.
        problem: what it is asked.
        compute: (input, R) -> the kernel's results.
        exact: (input, R, op arguments), in float64 -> what they should be; shapes may differ.
        moment: the result is a second moment: every entry is held to its own natural size.
    """

    family: str
    kernel: str
    configuration: str
    precision: str
    problem: Problem
    compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]
    moment: bool = False

    @property
    def name(self) -> str:
        """E.g. "triton gram_shift [64x64x64 w4 s3] bf16: 3x3 72@9x7"."""
        what = f"{self.family} {self.kernel} [{self.configuration}] {self.precision}"
        return f"{what}: {self.problem.label}"


def run(check: Check, device: torch.device) -> dict[str, Any]:
    """Runs a check: {"status": "passed" or "failed", "kernel", ..., "error", "bound"}, plain data.

    What compiling or launching the kernel raises passes through.
    """
    x = check.problem.input(DTYPES[check.precision], device)
    R = check.problem.R(device)
    with products_in(check.precision), poisoned():
        results = [check.compute(x, R) for _ in range(REPEATS)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    first = [t.cpu() for t in results[0]]
    exact = check.exact(x.cpu().double(), R.cpu().double(), *check.problem.arguments)
    measure = moment_error if check.moment else error
    worst = max(measure(got, e.reshape(got.shape)) for got, e in zip(first, exact))
    same = all(torch.equal(a, b.cpu()) for other in results[1:] for a, b in zip(first, other))
    bound = BOUNDS[check.precision]
    record: dict[str, Any] = {
        "family": check.family,
        "kernel": check.kernel,
        "configuration": check.configuration,
        "dtype": check.precision,
        "geometry": check.problem.label,
        "error": worst,
        "bound": bound,
        "status": "passed" if worst <= bound and same else "failed",
    }
    if worst > bound:
        record["reason"] = f"error {worst:.2e} above the bound {bound:.0e}"
    elif not same:
        record["reason"] = "two runs on the same input differ"
    return record


def moments(compute: Callable[[Tensor, ConvGeometry], Tensor], problem: Problem) -> dict[str, Any]:
    """The fields of a Check of S: ``compute`` (input, geometry) -> S."""
    geometry = problem.geometry
    return {
        "problem": problem,
        "compute": lambda x, R: (compute(x, geometry),),
        "exact": lambda x, R, *arguments: (reference.patch_gram(x, *arguments),),
        "moment": True,
    }


def statistics(
    compute: Callable[[Tensor, Tensor, ConvGeometry], tuple[Tensor, ...]], problem: Problem
) -> dict[str, Any]:
    """The fields of a Check of C and V: ``compute`` (input, R, geometry) -> (C, V)."""
    geometry = problem.geometry
    return {
        "problem": problem,
        "compute": lambda x, R: compute(x, R, geometry)[:2],
        "exact": reference.decor_stats,
    }


def weighed(x: Tensor, R: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """E = c_weight C + diag(v_weight v) and the loss of M = R R^T, by their definitions."""
    M = R @ R.mT
    v = M.diagonal(dim1=-2, dim2=-1) - 1
    C = M - torch.diag_embed(v + 1)
    loss = RULE.c_weight * C.square().sum((1, 2)) + RULE.kappa * v.square().sum(1)
    return RULE.c_weight * C + torch.diag_embed(RULE.v_weight * v), loss


def error(result: Tensor, exact: Tensor) -> float:
    """max |result - exact| / max |exact|; NaN counts as infinite."""
    difference = (result.double() - exact).abs().max()
    ratio = difference / exact.abs().max() if difference else difference
    return ratio.nan_to_num(nan=float("inf")).item()


def moment_error(S: Tensor, exact: Tensor) -> float:
    """max |S - exact|_ij / sqrt(exact_ii exact_jj); NaN counts as infinite.

    Entries of taps that see padding only must be exactly zero.
    """
    scale = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    difference = (S.double() - exact).abs()
    ratio = difference / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    ratio = torch.where(difference == 0, 0.0, ratio)
    return ratio.nan_to_num(nan=float("inf")).max().item()


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty returns within it is full of NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # its attribute is made at run time
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = filled
