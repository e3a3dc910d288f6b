"""The ops with the conveniences of torch.nn.functional: ints, strings, padding modes, unbatched input.

D is the length of a patch, Cin/groups * prod(kernel_size), ordered (channel, tap) as
``torch.nn.functional.unfold`` orders it; n is the number of patches. Sources: Dalm et al.,
"Efficient Deep Learning with Decorrelated Backpropagation", arXiv 2405.02385, sections 2.1-2.2.

Arguments common to the functions on patches:
    input: (N, C, *spatial) with 1 to 3 spatial dimensions, or (C, *spatial) where ``kernel_size`` is
        a sequence; any strides. float16, bfloat16, float32 or float64; statistics are float32
        (float64 for float64). With ``kernel_size=()``: (..., D), whose rows already are the patches.
    kernel_size, stride, dilation: an int or one int per spatial dimension. An int kernel_size means
        ``input.dim() - 2`` spatial dimensions.
    padding: the same, or "valid", or "same" (stride 1 only; an even span pads the extra pixel at the
        right and bottom).
    padding_mode: "zeros", "reflect", "replicate" or "circular".
They raise TypeError or ValueError naming the argument; what torch's convolutions raise RuntimeError
for, such as a kernel larger than the padded input, is an error of both kinds. An argument of a type
that the operator does not take is a RuntimeError, as torch's dispatcher raises it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from dbp_kernels import ops
from dbp_kernels.ops import condensed_weight, condensed_weight_transposed
from dbp_kernels.planning.geometry import GeometryError, OpArguments, same_padding

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "condensed_weight",
    "condensed_weight_transposed",
    "decor_conv1d",
    "decor_conv2d",
    "decor_conv3d",
    "decor_conv_transpose2d",
    "decor_linear",
    "decor_stats",
    "decor_update",
    "decorrelate",
    "pad_input",
    "patch_gram",
    "patch_mean",
]

IntOrInts = int | Sequence[int]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _is_int(value: object) -> TypeIs[SupportsIndex]:
    # numpy's integers are registered as such; its arrays have an __index__, too
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def _ints(name: str, value: IntOrInts, dims: int) -> list[int]:
    if type(value) is tuple and [type(v) for v in value] == [int] * dims:
        return list(value)  # as layers have them, in every forward pass
    values = [value] if _is_int(value) else value
    if (
        not isinstance(values, Sequence)
        or isinstance(values, bytes)
        or not all(map(_is_int, values))
    ):
        raise TypeError(f"{name}={value!r}: expected an int or {dims} ints")
    # numpy's integers become ints; symbolic ones stay what they are
    values = [v if isinstance(v, int | torch.SymInt) else operator.index(v) for v in values]
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise GeometryError(f"{name}={value}: expected an int or {dims} ints")
    return values


def _is_one(value: object, default: int) -> bool:
    """Whether it says of a window's part that there is none."""
    return (
        value in ("valid", "same")
        if isinstance(value, str)
        else _is_int(value) and value == default
    )


def _padding(
    kernel_size: Sequence[int],
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    padding_mode: str,
) -> tuple[tuple[int, ...], str, list[int]]:
    """(what to pad by beforehand and in which mode, both as F.pad takes them; the ops' padding)."""
    dims = len(kernel_size)
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode={padding_mode!r}: expected one of {', '.join(map(repr, PADDING_MODES))}"
        )
    if isinstance(padding, str):
        if padding == "valid":
            pairs = [(0, 0)] * dims
        elif padding == "same":
            if any(s != 1 for s in _ints("stride", stride, dims)):
                raise GeometryError(f"padding='same' with stride={stride}: expected stride 1")
            pairs = [
                same_padding(k, d) for k, d in zip(kernel_size, _ints("dilation", dilation, dims))
            ]
        else:
            raise GeometryError(f"padding={padding!r}: expected an int, ints, 'same' or 'valid'")
    else:
        pairs = [(p, p) for p in _ints("padding", padding, dims)]
        if any(low < 0 for low, _ in pairs):
            raise GeometryError(f"padding={padding}: expected at least 0")
    if padding_mode == "zeros":
        extra = [(0, high - low) for low, high in pairs]
        remaining = [low for low, _ in pairs]
    else:
        extra, remaining = pairs, [0] * dims
    flat = tuple(p for pair in reversed(extra) for p in pair)
    return flat, "constant" if padding_mode == "zeros" else padding_mode, remaining


def pad_input(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    padding_mode: str = "zeros",
) -> tuple[Tensor, list[int]]:
    """Resolves strings and padding modes to what the ops take: symmetric zero padding.

    Args:
        input: (N, C, *spatial) or (C, *spatial).

    Returns the input, padded as far as the op cannot, and the padding left to the op. Raises
    ValueError for an unknown string, for "same" with a stride, or negative padding.
    """
    ops.check_tensors(input=input)
    if not isinstance(kernel_size, Sequence) or isinstance(kernel_size, str):
        raise TypeError(f"kernel_size={kernel_size!r}: expected one int for each spatial dimension")
    flat, mode, remaining = _padding(kernel_size, stride, padding, dilation, padding_mode)
    return F.pad(input, flat, mode=mode) if any(flat) else input, remaining


def resolved(
    shape: Sequence[int],
    kernel_size: IntOrInts,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    padding_mode: str,
) -> tuple[tuple[int, ...], str, OpArguments, bool]:
    """How the ops see an input of this shape: F.pad's arguments, theirs, whether it is batched."""
    one = False
    if _is_int(kernel_size):
        one, dims = True, len(shape) - 2
    elif isinstance(kernel_size, Sequence):
        dims = len(kernel_size)
    else:
        raise TypeError(f"kernel_size={kernel_size!r}: expected an int or ints")
    if dims == 0 and not one:
        given = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
        for name, (value, default) in given.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if not all(_is_one(v, default) for v in values):
                raise GeometryError(f"{name}={value}: expected {default} with kernel_size=()")
        return (), "constant", ([], [], [], [], groups), True
    if not 1 <= dims <= 3 or len(shape) not in (dims + 1, dims + 2):
        raise GeometryError(
            f"input has shape {tuple(shape)} with kernel_size={kernel_size}: expected "
            "(N, C, *spatial) with 1 to 3 spatial dimensions, (C, *spatial) with one int of "
            "kernel_size for each, or kernel_size=() for an input (..., D)"
        )
    kernel = _ints("kernel_size", kernel_size, dims)
    flat, mode, remaining = _padding(kernel, stride, padding, dilation, padding_mode)
    strides, dilations = _ints("stride", stride, dims), _ints("dilation", dilation, dims)
    return flat, mode, (kernel, strides, remaining, dilations, groups), len(shape) == dims + 2


def op_arguments(
    input: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, OpArguments, bool]:
    """(input as the ops take it, their geometry arguments, whether the input was batched)."""
    ops.check_tensors(input=input)
    flat, mode, arguments, batched = resolved(
        input.shape, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    if not batched:
        input = input.unsqueeze(0)
    return F.pad(input, flat, mode=mode) if any(flat) else input, arguments, batched


def patch_gram(
    input: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The second moment S = <z z^T> of the input's patches, (groups, D, D), without im2col.

    The mean is over all N*OH*OW patches; no patches give zeros. Differentiable in the input.
    S is also the A factor of K-FAC, the GPTQ Hessian and the ZCA covariance of a convolution.
    """
    x, arguments, _ = op_arguments(
        input, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    checked = type(groups) is int  # else the dispatcher shall say what is wrong with it
    call = ops.patch_gram if checked and ops.direct(x) else torch.ops.dbp.patch_gram
    return call(x, *arguments)


def patch_mean(
    input: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The mean patch <z>, (groups, D). No patches give zeros. Differentiable in the input."""
    x, arguments, _ = op_arguments(
        input, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    return torch.ops.dbp.patch_mean(x, *arguments)


def decorrelate(
    input: Tensor,
    R: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """x = R z at every position: (N, groups*D, *output), or (..., groups*D) for kernel_size=().

    R is (groups, D, D), or (D, D) when groups = 1; the result has the input's dtype.
    Differentiable in both.
    """
    x, arguments, batched = op_arguments(
        input, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    out = torch.ops.dbp.decorrelate(x, R, *arguments)
    return out if batched else out.squeeze(0)


def decor_stats(
    input: Tensor,
    R: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """The statistics of x = R z: C = <x x^T> with zero diagonal, and the diagonal of V = <x^2> - 1.

    Shapes (groups, D, D) and (groups, D). No patches: C = 0, V = -1. Differentiable in both.
    """
    x, arguments, _ = op_arguments(
        input, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    return torch.ops.dbp.decor_stats(x, R, *arguments)


def decor_update(
    input: Tensor,
    R: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    lr: float,
    kappa: float = 0.5,
    rule: str = "standard",
    demean: bool = False,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """One step of R <- R - lr [(1-kappa) C + kappa V] R. Returns (R_new, loss); R is not changed.

    Args:
        R: (groups, D, D), or (D, D) when groups = 1; float32 or float64.
        lr: eps in the paper, at least 0.
        kappa: 0 decorrelates only, 1 normalises variance only.
        rule: "standard" as in the paper, or "normalized": C weighed by (1-kappa)/(D-1), V by 2 kappa.
        demean: use the patches' covariance in place of their second moment.

    The loss is 0-dimensional, the mean over groups of
    [(1-kappa) sum C^2 + kappa sum v^2] / D^2 (paper eq. 3), or of
    [(1-kappa)/(D-1) sum C^2 + kappa sum v^2] / D. No patches: R unchanged, loss 0.
    Not differentiable: R learns by this rule alone.
    """
    x, arguments, _ = op_arguments(
        input, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    return torch.ops.dbp.decor_update(x, R, *arguments, lr, kappa, rule, demean)


def _decor_conv(
    op: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    padding_mode: str,
) -> Tensor:
    ops.check_tensors(input=input, weight=weight, R=R)
    if weight.dim() != dims + 2:
        raise GeometryError(
            f"weight has shape {tuple(weight.shape)}: expected {dims + 2} dimensions "
            f"(out, Cin/groups, and {dims} of the kernel)"
        )
    if input.dim() not in (dims + 1, dims + 2):
        raise GeometryError(
            f"input has shape {tuple(input.shape)}: expected {dims + 1} (unbatched) or {dims + 2} "
            "dimensions"
        )
    x, remaining = pad_input(input, weight.shape[2:], stride, padding, dilation, padding_mode)
    strides, dilations = _ints("stride", stride, dims), _ints("dilation", dilation, dims)
    if input.dim() == dims + 2:
        return op(x, weight, R, bias, strides, remaining, dilations, groups)
    return op(x.unsqueeze(0), weight, R, bias, strides, remaining, dilations, groups).squeeze(0)


def decor_conv1d(
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``decor_conv2d`` in one dimension: input (N, C, L), weight (out, C/groups, K)."""
    op = torch.ops.dbp.decor_conv1d
    return _decor_conv(
        op, 1, input, weight, R, bias, stride, padding, dilation, groups, padding_mode
    )


def decor_conv2d(
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """y = W R z + b: the convolution of ``torch.nn.functional.conv2d`` with the weight A = W R.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (out, C/groups, KH, KW), as of the plain layer.
        R: (groups, D, D), or (D, D) when groups = 1.
        bias: (out,) or None.

    Gradients reach the input, weight and bias, and R if it requires one. Source: paper section 2.2.
    """
    op = torch.ops.dbp.decor_conv2d
    return _decor_conv(
        op, 2, input, weight, R, bias, stride, padding, dilation, groups, padding_mode
    )


def decor_conv3d(
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``decor_conv2d`` in three dimensions: input (N, C, T, H, W), weight (out, C/groups, *kernel)."""
    op = torch.ops.dbp.decor_conv3d
    return _decor_conv(
        op, 3, input, weight, R, bias, stride, padding, dilation, groups, padding_mode
    )


def decor_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d`` of decorrelated pixels; D = Cin/groups.

    Args:
        input: (N, Cin, H, W) or (Cin, H, W). A patch is one pixel's channels.
        weight: (Cin, out/groups, KH, KW).
        R: (groups, D, D), or (D, D) when groups = 1.
    """
    ops.check_tensors(input=input, weight=weight, R=R)
    if input.dim() not in (3, 4):
        raise GeometryError(f"input has shape {tuple(input.shape)}: expected 3 or 4 dimensions")
    arguments = (
        _ints("stride", stride, 2),
        _ints("padding", padding, 2),
        _ints("output_padding", output_padding, 2),
        groups,
        _ints("dilation", dilation, 2),
    )
    x = input if input.dim() == 4 else input.unsqueeze(0)
    out = torch.ops.dbp.decor_conv_transpose2d(x, weight, R, bias, *arguments)
    return out if input.dim() == 4 else out.squeeze(0)


def decor_linear(input: Tensor, weight: Tensor, R: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = W R z + b for input (..., D), weight (out, D), R (D, D), bias (out,) or None.

    Gradients reach the input, weight and bias, and R if it requires one. Source: paper section 2.1.
    """
    ops.check_tensors(input=input, weight=weight, R=R)
    return torch.ops.dbp.decor_linear(input, weight, R, bias)
