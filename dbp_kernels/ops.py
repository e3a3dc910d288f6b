"""The operators of ``torch.ops.dbp``: definitions, fake kernels, autograd, dispatch to a backend.

Two kinds, never mixed in one. *Composites* (decorrelate, decor_conv*, decor_linear) are aten calls
without a kernel of their own, so that autograd and every torch.func transform see through them (where
nobody but autograd looks, one may be an autograd.Function: see `rows_times`).
*Opaque* ops (patch_gram, patch_mean, decor_stats, decor_update) have backend kernels; a composite
with a kernel of its own would lose its gradient silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from dbp_kernels import backends, choose
from dbp_kernels.phases import CONDENSE, phase
from dbp_kernels.plain_call import nothing_between, plain
from dbp_kernels.planning.geometry import (
    ConvGeometry,
    GeometryError,
    OpArguments,
    make_geometry,
)
from dbp_kernels.precision import INPUT_DTYPES, computed_in_half, statistics_dtype, without_autocast
from dbp_kernels.products.rows_times import rows_times, times
from dbp_kernels.rules import UpdateRule

if TYPE_CHECKING:
    from typing_extensions import Unpack

_lib = torch.library.Library("dbp", "DEF")
SCHEMAS = tuple(
    line
    for line in files(__package__).joinpath("schemas.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
for _schema in SCHEMAS:
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# --------------------------------------------------------------------------- checks


def check_tensors(**given: object) -> None:
    """Raises TypeError where one is no tensor, nor what stands for one, as torch.fx's proxies do."""
    for name, x in given.items():
        if not isinstance(x, Tensor) and not hasattr(type(x), "__torch_function__"):
            raise TypeError(f"{name} is a {type(x).__name__}: expected a Tensor")


class DtypeError(TypeError, RuntimeError):
    """A dtype that no operator takes. Torch's own convolutions raise RuntimeError for it."""


def _check_floating(**tensors: Tensor) -> None:
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in INPUT_DTYPES:
            raise DtypeError(
                f"{name} has dtype {tensor.dtype}: expected a floating-point dtype of 16 to 64 bits"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}: expected torch.strided")


def _check_R(R: Tensor, groups: int, dim: int) -> None:
    _check_floating(R=R)
    expected = [(groups, dim, dim)] + ([(dim, dim)] if groups == 1 else [])
    if tuple(R.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise ValueError(
            f"R has shape {tuple(R.shape)}: expected {shapes} for {groups} group(s) and patches of "
            f"length D={dim}"
        )


def _check_groups(groups: int, channels: int, where: str) -> None:
    if groups < 1 or channels % groups:
        raise GeometryError(
            f"groups={groups}: expected a divisor of the {channels} channels of {where}"
        )


def _check_same_device(x: Tensor, R: Tensor, whose: str = "input") -> None:
    if x.device != R.device:
        raise ValueError(f"R is on {R.device}: expected the {whose}'s device {x.device}")


def _check_weight(weight: Tensor, groups: int, channels: str) -> None:
    _check_floating(weight=weight)
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected at least 2 dimensions")
    if not isinstance(groups, (int, torch.SymInt, Integral)):
        raise TypeError(f"groups={groups!r}: expected an int")
    _check_groups(groups, weight.shape[0], channels)


_LARGEST = torch.finfo(torch.float32).max


def check_update(R: Tensor, lr: float, kappa: float, rule: str, dim: int) -> None:
    """Raises TypeError for R's dtype, ValueError for an option out of range."""
    if R.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"R has dtype {R.dtype}: expected float32 or float64, below which an update vanishes"
        )
    if not 0 <= lr <= _LARGEST:
        raise ValueError(f"lr={lr}: expected a number from 0 to {_LARGEST:.3g}, float32's largest")
    UpdateRule.make(rule, kappa, max(1, dim))


# --------------------------------------------------------------------------- opaque ops
# They run below autograd (see ``_differentiable``), so nothing in them is recorded.


def geometry_of(input: Tensor, *geometry: Unpack[OpArguments]) -> ConvGeometry:
    """From an op's arguments, which it checks. Kept: made anew, it would cost small layers dear."""
    _check_floating(input=input)
    *lists, groups = geometry
    return _cached_geometry(tuple(input.shape), *map(tuple, lists), groups)


_cached_geometry = lru_cache(maxsize=1024, typed=True)(make_geometry)  # 1.0 is not 1


def patch_gram(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """S: see ``functional.patch_gram``."""
    g = geometry_of(input, *geometry)
    if g.samples == 0 or g.dim == 0:
        dtype = statistics_dtype(input.dtype)
        return input.new_zeros((g.groups, g.dim, g.dim), dtype=dtype)
    with without_autocast(input):
        name = backends.selected(input.device)
        return backends.module(name).patch_gram(input, g, choose.gram(input, g, name))


def patch_mean(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """m: see ``functional.patch_mean``."""
    g = geometry_of(input, *geometry)
    if g.samples == 0 or g.dim == 0:
        return input.new_zeros((g.groups, g.dim), dtype=statistics_dtype(input.dtype))
    with without_autocast(input):
        return backends.select(input.device).patch_mean(input, g)


def _promote(input: Tensor, R: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Both operands in the dtype of the arithmetic; half-precision inputs are left to the backend."""
    dtype = torch.promote_types(statistics_dtype(input.dtype), statistics_dtype(R.dtype))
    R = R.to(dtype).reshape(groups, R.shape[-2], R.shape[-1])
    return (input.to(dtype) if dtype == torch.float64 else input), R


def decor_stats(input: Tensor, R: Tensor, *geometry: Unpack[OpArguments]) -> tuple[Tensor, Tensor]:
    """C and V: see ``functional.decor_stats``."""
    g = geometry_of(input, *geometry)
    _check_R(R, g.groups, g.dim)
    _check_same_device(input, R)
    with without_autocast(input):
        input, R = _promote(input, R, g.groups)
        if g.samples == 0 or g.dim == 0:
            return torch.zeros_like(R), R.new_full((g.groups, g.dim), -1.0)
        name = backends.selected(input.device)
        return backends.module(name).decor_stats(input, R, g, choose.stats(input, g, name))


def decor_update(
    input: Tensor,
    R: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lr: float,
    kappa: float,
    rule: str = "standard",
    demean: bool = False,
) -> tuple[Tensor, Tensor]:
    """R_new and loss: see ``functional.decor_update``."""
    g = geometry_of(input, kernel_size, stride, padding, dilation, groups)
    _check_R(R, g.groups, g.dim)
    _check_same_device(input, R)
    check_update(R, lr, kappa, rule, g.dim)
    with without_autocast(input):
        if g.samples == 0 or g.dim == 0:
            return R.clone(memory_format=torch.contiguous_format), R.new_zeros(())
        x, Rg = _promote(input, R, g.groups)
        name = backends.selected(input.device)
        choice = choose.update(x, g, name)
        work_out = backends.module(name).decor_update
        update = work_out(x, Rg, g, UpdateRule.make(rule, kappa, g.dim), demean, choice)
        R_new = update.new(Rg, lr)
        return R_new.to(R.dtype).reshape(R.shape), update.loss.mean().to(R.dtype)


# --------------------------------------------------------------------------- fake kernels


def _patch_dim(input: Tensor, kernel_size: Sequence[int], groups: int) -> int:
    """D, checking what it is made of. Sizes may be symbols."""
    dims = len(kernel_size)
    _check_floating(input=input)
    if dims > 3 or (input.dim() != dims + 2 and dims) or input.dim() == 0:
        raise GeometryError(
            f"input has shape {tuple(input.shape)} with kernel_size={list(kernel_size)}: expected "
            "(N, C, *spatial) with one entry of kernel_size for each of 1 to 3 spatial dimensions, "
            "or (..., D) with kernel_size=[]"
        )
    channels = input.shape[1] if dims else input.shape[-1]
    _check_groups(groups, channels, "the input")
    return channels // groups * math.prod(kernel_size)


def _fake_gram(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    kernel_size, *_, groups = geometry
    d = _patch_dim(input, kernel_size, groups)
    return input.new_empty((groups, d, d), dtype=statistics_dtype(input.dtype))


def _fake_mean(input: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    kernel_size, *_, groups = geometry
    d = _patch_dim(input, kernel_size, groups)
    return input.new_empty((groups, d), dtype=statistics_dtype(input.dtype))


def _fake_stats(input: Tensor, R: Tensor, *geometry: Unpack[OpArguments]) -> tuple[Tensor, Tensor]:
    kernel_size, *_, groups = geometry
    d = _patch_dim(input, kernel_size, groups)
    _check_R(R, groups, d)
    _check_same_device(input, R)
    dtype = torch.promote_types(statistics_dtype(input.dtype), statistics_dtype(R.dtype))
    return input.new_empty((groups, d, d), dtype=dtype), input.new_empty((groups, d), dtype=dtype)


def _fake_update(
    input: Tensor,
    R: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lr: float,
    kappa: float,
    rule: str = "standard",
    demean: bool = False,
) -> tuple[Tensor, Tensor]:
    d = _patch_dim(input, kernel_size, groups)
    _check_R(R, groups, d)
    _check_same_device(input, R)
    check_update(R, lr, kappa, rule, 1)
    return torch.empty_like(R, memory_format=torch.contiguous_format), R.new_empty(())


# --------------------------------------------------------------------------- gradients


def _per_axis(dims: int, *arguments: Sequence[int]) -> list[list[int]]:
    """A single entry stands for all axes, as in aten."""
    return [list(v) * (dims if len(v) == 1 else 1) for v in arguments]


def _scatter_patches(y: Tensor, like: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """col2im, the adjoint of im2col: y (N, groups*D, *output) -> the shape of ``like``."""
    kernel_size, stride, padding, dilation, groups = geometry
    dims = len(kernel_size)
    stride, padding, dilation = _per_axis(dims, stride, padding, dilation)
    if dims < 3:
        line = dims == 1  # an image of one row
        size = (1, like.shape[2]) if line else tuple(like.shape[2:])
        window = (
            (0 if v is padding else 1,) * line + tuple(v) for v in (dilation, padding, stride)
        )
        image = F.fold(y.flatten(2), size, (1,) * line + tuple(kernel_size), *window)
        return image.squeeze(2) if line else image
    # a convolution with one-hot weights is im2col, and this its transpose
    d = _patch_dim(like, kernel_size, groups)
    one_hot = torch.eye(d, dtype=y.dtype, device=y.device).repeat(groups, 1)
    weight = one_hot.view(groups * d, like.shape[1] // groups, *kernel_size)
    lost = [
        (size + 2 * p - r * (k - 1) - 1) % s
        for size, k, s, p, r in zip(like.shape[2:], kernel_size, stride, padding, dilation)
    ]
    return torch.conv_transpose3d(y, weight, None, stride, padding, lost, groups, dilation)


def _gram_gradient(input: Tensor, grad_S: Tensor, *geometry: Unpack[OpArguments]) -> Tensor:
    """dL/dinput from dL/dS: dZ = Z (G + G^T) / n, scattered back to the pixels."""
    kernel_size = geometry[0]
    x = input.to(grad_S.dtype)
    symmetric = grad_S + grad_S.mT
    dz = decorrelate(x, symmetric, *geometry)
    n = dz.numel() // max(1, symmetric.shape[0] * symmetric.shape[-1])
    dz = dz / max(1, n)
    if len(kernel_size):
        dz = _scatter_patches(dz, input, *geometry)
    return dz.to(input.dtype)


def _save_for_gram(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.geometry = inputs[1:]


def _gram_backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    with without_autocast(input):
        return _gram_gradient(input, grad_S, *ctx.geometry), *[None] * 5


def _mean_backward(ctx: Any, grad_m: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    kernel_size, *window, _ = ctx.geometry
    with without_autocast(input):
        flat = grad_m.reshape(-1)
        if len(kernel_size) == 0:
            rows = max(1, input.numel() // max(1, input.shape[-1]))
            grad = (flat / rows).expand(input.shape)
        else:
            # not ConvGeometry: sizes are symbols under compilation with dynamic shapes
            output = [
                (size + 2 * p - d * (k - 1) - 1) // s + 1
                for size, k, s, p, d in zip(
                    input.shape[2:], kernel_size, *_per_axis(len(kernel_size), *window)
                )
            ]
            samples = max(1, input.shape[0] * math.prod(output))
            y = (flat / samples).view(1, -1, *[1] * len(kernel_size)).expand(1, -1, *output)
            grad = _scatter_patches(y, input, *ctx.geometry).expand(input.shape)
        return grad.to(input.dtype), *[None] * 5


def _save_for_stats(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:]


def _stats_backward(ctx: Any, grad_C: Tensor, grad_V: Tensor) -> tuple[Tensor | None, ...]:
    input, R = ctx.saved_tensors
    groups = ctx.geometry[-1]
    with without_autocast(input):
        # C and V are the two parts of M = R S R^T
        grad_M = grad_C - torch.diag_embed(grad_C.diagonal(dim1=-2, dim2=-1))
        grad_M = grad_M + torch.diag_embed(grad_V)
        Rg = R.to(grad_M.dtype).reshape(groups, R.shape[-2], R.shape[-1])
        grad_input = grad_R = None
        if ctx.needs_input_grad[1]:
            grad_input = _gram_gradient(input, Rg.mT @ grad_M @ Rg, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            S = torch.ops.dbp.patch_gram(input, *ctx.geometry).to(grad_M.dtype)
            grad_R = ((grad_M + grad_M.mT) @ Rg @ S).reshape(R.shape).to(R.dtype)
    return grad_input, grad_R, *[None] * 5


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # R learns by its own rule: no gradient flows into or through the update (paper, section 2.1)
    ctx.mark_non_differentiable(*output)


def _never(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError("dbp::decor_update has no gradient")


# --------------------------------------------------------------------------- composites


@phase(CONDENSE)
def condensed_weight(weight: Tensor, R: Tensor, groups: int = 1) -> Tensor:
    """A = W R, the weight of the plain convolution or linear map equal to the decorrelated one.

    Args:
        weight: (out, Cin/groups, *kernel) or (out, D).
        R: (groups, D, D), or (D, D) when groups = 1.

    Formed in R's precision with autocast off, then cast: the shape and dtype of ``weight``. A
    float32 product on CUDA is in TF32 where that dtype, or autocast's, is half precision, to which A
    is rounded anyway; its gradients are not, nor is it in compiled code.
    Raises ValueError if R does not fit or is on another device, TypeError for an argument of another
    type. Source: DBP paper, section 2.2.
    """
    _check_weight(weight, groups, "weight's output")
    _check_R(R, groups, math.prod(weight.shape[1:]))
    _check_same_device(weight, R, "weight")
    rounded = computed_in_half(weight)
    with without_autocast(weight):
        dtype = torch.promote_types(R.dtype, weight.dtype)
        # one matrix as such: libraries run mm faster than bmm of one, both ways
        batch = () if groups == 1 else (groups,)
        W = weight.to(dtype).reshape(*batch, weight.shape[0] // groups, R.shape[-1])
        R = R.to(dtype).reshape(*batch, R.shape[-2], R.shape[-1])
        A = rows_times(W, R, rounded) if groups == 1 else times(W, R, rounded)
        return A.reshape(weight.shape).to(weight.dtype)


@phase(CONDENSE)
def condensed_weight_transposed(weight: Tensor, R: Tensor, groups: int = 1) -> Tensor:
    """A of a transposed convolution: A[g, j] = sum_i R[g, i, j] W[g, i], D = Cin/groups.

    Args:
        weight: (Cin, out/groups, *kernel).
        R: (groups, D, D), or (D, D) when groups = 1.

    Precision and errors as ``condensed_weight``.
    """
    _check_weight(weight, groups, "weight's input")
    _check_R(R, groups, weight.shape[0] // groups)
    _check_same_device(weight, R, "weight")
    rounded = computed_in_half(weight)
    with without_autocast(weight):
        dtype = torch.promote_types(R.dtype, weight.dtype)
        batch = () if groups == 1 else (groups,)
        W = weight.to(dtype).reshape(*batch, R.shape[-1], math.prod(weight.shape[1:]))
        A = times(R.to(dtype).reshape(*batch, R.shape[-2], R.shape[-1]).mT, W, rounded)
        return A.reshape(weight.shape).to(weight.dtype)


def decorrelate(
    input: Tensor,
    R: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    dim = _patch_dim(input, kernel_size, groups)
    _check_R(R, groups, dim)
    _check_same_device(input, R)
    R = R.to(input.dtype)
    if len(kernel_size) == 0:
        x = input.reshape(*input.shape[:-1], groups, dim)
        Rg = R.reshape(groups, dim, dim)
        x = torch.einsum("...gi,gji->...gj", x, Rg) if groups > 1 else x @ Rg[0].mT
        return x.reshape(*input.shape[:-1], groups * dim)
    weight = R.reshape(groups * dim, input.shape[1] // groups, *kernel_size)
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel_size) - 1]
    return conv(input, weight, None, stride, padding, dilation, groups)


def _decor_conv(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decor_conv(
        input: Tensor,
        weight: Tensor,
        R: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        A = condensed_weight(weight, R, groups)
        return conv(input, A, bias, stride, padding, dilation, groups)

    return decor_conv


def decor_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    A = condensed_weight_transposed(weight, R, groups)
    return torch.conv_transpose2d(input, A, bias, stride, padding, output_padding, groups, dilation)


def decor_linear(input: Tensor, weight: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, condensed_weight(weight, R), bias)


# --------------------------------------------------------------------------- registration


def direct(x: Tensor) -> bool:
    """Whether calling an opaque op on ``x`` alone is calling its implementation, nothing more.

    A linear layer of a few hundred features notices what the dispatcher takes (some 25 us).
    """
    return plain(x) and not (x.requires_grad and torch.is_grad_enabled())


def _differentiable(
    op: Any,
    implementation: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """The Autograd kernel of an opaque op.

    ``torch.library.register_autograd`` would lose forward-mode tangents silently when no input
    requires a gradient; an autograd.Function without a jvp raises. Single level, because functorch
    has peeled its levels off by the time a kernel runs.
    """

    class OpaqueOp(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return None, *gradient(ctx, *grads)

    schema = op._schema.arguments

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **named: Any) -> Any:
        # the dispatcher leaves out arguments that equal their defaults
        rest = [named.get(a.name, a.default_value) for a in schema[len(args) :]]
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not wanted and forward_ad._current_level < 0:
            if nothing_between(args[0]):
                return implementation(*args, *rest)
            return OpaqueOp.forward(keyset, *args, *rest)
        with enable_single_level_autograd_function():
            return OpaqueOp.apply(keyset, *args, *rest)  # type: ignore[attr-defined]

    return kernel


for _name, _kernel, _fake, _save, _backward in (
    ("patch_gram", patch_gram, _fake_gram, _save_for_gram, _gram_backward),
    ("patch_mean", patch_mean, _fake_mean, _save_for_gram, _mean_backward),
    ("decor_stats", decor_stats, _fake_stats, _save_for_stats, _stats_backward),
    ("decor_update", decor_update, _fake_update, _no_gradient, _never),
):
    _op = getattr(torch.ops.dbp, _name).default
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    _lib.impl(_name, _differentiable(_op, _kernel, _save, _backward), "Autograd", with_keyset=True)
    torch.library.register_fake(f"dbp::{_name}", _fake, lib=_lib)

for _name, _composite in (
    ("decorrelate", decorrelate),
    ("decor_conv1d", _decor_conv(torch.conv1d)),
    ("decor_conv2d", _decor_conv(torch.conv2d)),
    ("decor_conv3d", _decor_conv(torch.conv3d)),
    ("decor_conv_transpose2d", decor_conv_transpose2d),
    ("decor_linear", decor_linear),
):
    _lib.impl(_name, _composite, "CompositeImplicitAutograd")
    # without this, vmap falls back to a loop over the batch
    _lib.impl(_name, _composite, "FuncTorchBatchedDecomposition")
