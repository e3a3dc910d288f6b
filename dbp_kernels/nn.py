"""Decorrelated layers: the torch layer plus a buffer R.

Each layer computes ``y = W (R z) + b`` over its input patches z as one ordinary layer with the
condensed weight ``A = W R`` (DBP paper, arXiv 2405.02385). No gradient flows into R; a
`dbp_kernels.DecorUpdate` learns it from samples of the input. With R = I, where it starts, a layer
equals its torch counterpart.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dbp_kernels import functional
from dbp_kernels.loaded import StateError, is_int, why_no_R
from dbp_kernels.op_input import OpInput, op_inputs
from dbp_kernels.ops import check_tensors
from dbp_kernels.plain_call import plain
from dbp_kernels.precision import matmul_precision, statistics_dtype, without_autocast
from dbp_kernels.sampling import Recorder, record

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "DecorConv1d",
    "DecorConv2d",
    "DecorConv3d",
    "DecorConvTranspose2d",
    "DecorLinear",
    "Decorrelate",
    "identity_R",
    "is_decorrelated",
]


# Attributes of a layer that are there because an optimiser is: copies and plain layers have none.
OF_THE_OPTIMISER = ("_recorder", "_recorder_key", "_order_known")
# What a layer notes beside its entries in a state_dict, in _metadata: its _transposed.
TRANSPOSED = "dbp_transposed"


def identity_R(
    groups: int, size: int, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """The R a layer starts with: (D, D), or (groups, D, D) with groups > 1, at least float32."""
    shape = (size, size) if groups == 1 else (groups, size, size)
    return set_identity_(torch.empty(shape, device=device, dtype=statistics_dtype(dtype)))


def set_identity_(R: Tensor) -> Tensor:
    """R (..., D, D) becomes the identity, in place."""
    R.zero_()
    R.diagonal(dim1=-2, dim2=-1).fill_(1)
    return R


def fused_weight(weight: Tensor, R: Tensor, transposed: bool) -> Tensor:
    """A = W R for good, in the weight's dtype; ``weight`` itself where R is exactly the identity.

    Args:
        weight: as the layer's: (out, ...), or (in, out/groups, ...) where ``transposed``.
        R: (D, D), or (groups, D, D) with groups > 1.
        transposed: whether the patch runs along the weight's first dimension, as in transposed
            convolutions.

    The product is of float32, whatever torch is set to, or of float64 where either is. Raises
    ValueError if R does not fit.
    """
    groups = R.shape[0] if R.dim() == 3 else 1
    R = R.to(statistics_dtype(torch.promote_types(R.dtype, weight.dtype)))
    if not R.is_meta and torch.equal(R, identity_R(groups, R.shape[-1], R.device, R.dtype)):
        return weight
    with matmul_precision("highest"), without_autocast(weight), torch.no_grad():
        return _condensed(weight.to(R.dtype), R, groups, transposed).to(weight.dtype)


def _condensed(weight: Tensor, R: Tensor, groups: int, transposed: bool) -> Tensor:
    if transposed:
        return functional.condensed_weight_transposed(weight, R, groups)
    return functional.condensed_weight(weight, R, groups)


class _Decorrelated(nn.Module):
    """What every decorrelated layer shares: the buffer R, its precision, its checkpoints.

    ``load_state_dict()`` raises StateError, a ValueError and a RuntimeError, for an R of another shape,
    that is not finite, or has rows of zeros or longer than `loaded.MAX_NORM`: of a model that
    ``decorrelate_model`` or a `DecorUpdate` was given before anything is changed, else before this
    layer is.

    R has shape (D, D), or (groups, D, D) with groups > 1, for patches of D entries. It stays at
    least float32 under ``.half()``, ``.bfloat16()`` and ``.to(dtype)``: an update of 1e-5 vanishes
    below.
    """

    R: Tensor
    weight: Tensor  # of the torch layer
    # Whether the patch runs along the weight's first dimension; None where there is no weight.
    _transposed: bool | None = False
    # Class attributes, so that surgery can turn a plain layer into this class.
    _recorder: weakref.ref[Recorder] | None = None
    _recorder_key: Tensor | None = None
    _order_known = False  # whether a backward pass has found R as it was in the forward pass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register_R(self.weight.device, self.weight.dtype)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = plain_class(cls)
        if plain is not None and "__init__" not in cls.__dict__:
            cls.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]

    # What each layer says about its patches.

    def _patch_geometry(self) -> dict[str, Any]:
        """Arguments by which the statistics see this layer's patches."""
        raise NotImplementedError

    def _patch_size(self) -> tuple[int, int]:
        """(groups, D)."""
        raise NotImplementedError

    def _as_images(self, input: Tensor) -> Tensor:
        """The input with a leading dimension to sample along."""
        raise NotImplementedError

    def _op_inputs(self, samples: Sequence[Tensor]) -> list[OpInput]:
        """Such images as the statistics take them."""
        return op_inputs(samples, self._patch_geometry())

    @property
    def _learns(self) -> bool:
        """Whether R may change: where the weight is frozen, the layer's function is to stay as it is."""
        weight = self._parameters.get("weight")
        return weight is None or weight.requires_grad

    def _gradient(self) -> None:
        """What changes with the weight's gradient, where samples depend on it: here never."""

    def _condense(self) -> Tensor:
        """A = W R, the weight of the equal plain layer."""
        return _condensed(self.weight, self.R, self._patch_size()[0], bool(self._transposed))

    def _passed(self, input: Tensor, output: Tensor) -> None:
        """Called after a forward pass: hands its input to the optimiser, if there is one."""
        record(self, input)
        if torch.compiler.is_compiling() or self._recorder is None or self._order_known:
            return
        if output.requires_grad and self._learns and plain(output):
            self._watch(output)

    def _watch(self, output: Tensor) -> None:
        """Have the backward pass of ``output`` say so if R has changed since.

        Only until the first one was right: who calls ``step()`` too early does so from the start.
        """
        R, version = self.R, self.R._version

        def check(gradient: Tensor) -> None:
            if R._version != version:
                raise RuntimeError(
                    f"R of {self} was modified by an inplace operation between forward() and "
                    "backward(), which needs it as it was: call step() of the DecorUpdate after "
                    "backward()"
                )
            self._order_known = True

        output.register_hook(check)

    # R.

    def _register_R(self, device: torch.device, dtype: torch.dtype) -> None:
        self.register_buffer("R", identity_R(*self._patch_size(), device, dtype))

    @torch.no_grad()
    def reset_decorrelation(self) -> None:
        """Set R back to the identity, in place."""
        set_identity_(self.R)

    def reset_parameters(self) -> None:
        """Reset the weights as torch does, and R to the identity."""
        super().reset_parameters()  # type: ignore[misc]  # of the torch layer
        if "R" in self._buffers:  # the torch constructor calls this before there is an R
            self.reset_decorrelation()

    def _apply(self, fn: Any, recurse: bool = True) -> _Decorrelated:
        before = self._buffers.get("R")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers.get("R")
        if before is None or after is None:  # somebody has set it to None: forward() says so
            return self
        dtype = statistics_dtype(after.dtype)
        if before.is_meta and not after.is_meta:
            # Leaving the meta device gives uninitialised memory, for which R knows a value.
            self._buffers["R"] = identity_R(*self._patch_size(), after.device, dtype)
        elif after.dtype != dtype:
            # From `before`: a round trip through half precision would round R.
            self._buffers["R"] = before.to(device=after.device, dtype=dtype)
        return self

    # Checkpoints and copies.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        notes = getattr(destination, "_metadata", {})
        notes.setdefault(prefix[:-1], {})[TRANSPOSED] = self._transposed

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._check_loaded(state_dict, prefix, local_metadata)
        key = prefix + "R"
        # A checkpoint that has this layer but no R is of a plain model: its R is the identity. One
        # without the layer (loaded with strict=False: torch does not say so here) changes nothing.
        known = not self._parameters or any(name.startswith(prefix) for name in state_dict)
        plain = key not in state_dict and known
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        R = self._buffers.get("R")
        if R is None:
            return
        if plain:
            if key in missing_keys:
                missing_keys.remove(key)
            weight = self._parameters.get("weight")
            if R.is_meta and weight is not None:  # load_state_dict(assign=True) has placed it
                self._buffers["R"] = identity_R(*self._patch_size(), weight.device, R.dtype)
            else:
                self.reset_decorrelation()
        elif R.dtype != statistics_dtype(R.dtype):  # assign=True with a half-precision R
            self._buffers["R"] = R.to(statistics_dtype(R.dtype))

    def _check_loaded(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Raises StateError if there is an R in it that this layer cannot have."""
        key, R = prefix + "R", self._buffers.get("R")
        if key not in state_dict or R is None:
            return
        reason = why_no_R(state_dict[key], R.shape)
        replaced = metadata.get("assign_to_params_buffers", False)
        if reason is None and state_dict[key].is_meta and not (R.is_meta or replaced):
            reason = "is on meta: expected values"
        if reason is not None:
            told = "size mismatch for " * reason.startswith("of shape")  # as torch says
            raise StateError(f"{told}{key} in the loaded state_dict {reason}")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for attribute in OF_THE_OPTIMISER:
            state.pop(attribute, None)
        return state

    def extra_repr(self) -> str:
        R = self._buffers.get("R")
        return f"{super().extra_repr()}, R={None if R is None else tuple(R.shape)}"


def check_loaded(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str = "",
    local_metadata: Mapping[str, Any] | None = None,
    *_: Any,
) -> None:
    """Raises StateError if a layer cannot have its R in ``state_dict``; a hook of load_state_dict.

    So that it is all or nothing: torch loads one layer after the other.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if is_decorrelated(module):
            own = f"{prefix}{name}." if name else prefix
            module._check_loaded(state_dict, own, local_metadata or {})


def is_decorrelated(module: nn.Module) -> TypeIs[_Decorrelated]:
    """Whether the module is one of this package's layers (or a subclass of one)."""
    return isinstance(module, _Decorrelated)


def plain_class(cls: type) -> type[nn.Module] | None:
    """The torch layer that a decorrelated layer class extends; None for `Decorrelate`."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.") and base is not nn.Module:
            return base
    return None


class DecorLinear(_Decorrelated, nn.Linear):
    """`torch.nn.Linear` with a decorrelated input: ``y = W (R x) + b``.

    Takes the arguments of `torch.nn.Linear`. Buffer R: (in_features, in_features). Samples are
    taken along the first dimension of the input, so for (sequence, batch, features) they are
    positions: use ``sampling="random"`` there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        output = functional.decor_linear(input, self.weight, self.R, self.bias)
        self._passed(input, output)
        return output

    def _patch_geometry(self) -> dict[str, Any]:
        return {"kernel_size": ()}

    def _patch_size(self) -> tuple[int, int]:
        return 1, self.in_features

    def _as_images(self, input: Tensor) -> Tensor:
        return input if input.dim() > 1 else input.unsqueeze(0)


class _DecorConvNd(_Decorrelated):
    """The parts that decorrelated convolutions of every dimension share."""

    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    def _conv_arguments(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }

    def _patch_geometry(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel_size, **self._conv_arguments()}

    def _patch_size(self) -> tuple[int, int]:
        return self.groups, self.in_channels // self.groups * math.prod(self.kernel_size)

    def _as_images(self, input: Tensor) -> Tensor:
        return input if input.dim() > len(self.kernel_size) + 1 else input.unsqueeze(0)

    def _convolve(self, decor_conv: Callable[..., Tensor], input: Tensor) -> Tensor:
        output = decor_conv(input, self.weight, self.R, self.bias, **self._conv_arguments())
        self._passed(input, output)
        return output


class DecorConv1d(_DecorConvNd, nn.Conv1d):
    """`torch.nn.Conv1d` over decorrelated patches; takes its arguments.

    Buffer R: (D, D) with D = in_channels/groups * kernel_size, or (groups, D, D) with groups > 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L) or (C, L), as torch.nn.Conv1d."""
        return self._convolve(functional.decor_conv1d, input)


class DecorConv2d(_DecorConvNd, nn.Conv2d):
    """`torch.nn.Conv2d` over decorrelated patches; takes its arguments.

    Buffer R: (D, D) with D = in_channels/groups * KH * KW, or (groups, D, D) with groups > 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W), as torch.nn.Conv2d."""
        return self._convolve(functional.decor_conv2d, input)


class DecorConv3d(_DecorConvNd, nn.Conv3d):
    """`torch.nn.Conv3d` over decorrelated patches; takes its arguments.

    Buffer R: (D, D) with D = in_channels/groups * KD * KH * KW, or (groups, D, D) with groups > 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) or (C, D, H, W), as torch.nn.Conv3d."""
        return self._convolve(functional.decor_conv3d, input)


class DecorConvTranspose2d(_Decorrelated, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` over decorrelated pixels; takes its arguments.

    The patch is one pixel's channels. Buffer R: (D, D) with D = in_channels/groups, or
    (groups, D, D) with groups > 1.
    """

    _transposed = True

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, C, H, W) or (C, H, W), as torch.nn.ConvTranspose2d, with its output_size."""
        check_tensors(input=input)
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros' for DecorConvTranspose2d, got {self.padding_mode!r}"
            )
        output_padding = self._output_padding(  # types as in torch's own layer, which ignores them
            input,
            output_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        window = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        output = functional.decor_conv_transpose2d(
            input,
            self.weight,
            self.R,
            self.bias,
            *window,  # type: ignore[arg-type]
        )
        self._passed(input, output)
        return output

    def _patch_geometry(self) -> dict[str, Any]:
        return {"kernel_size": (1, 1), "groups": self.groups}

    def _patch_size(self) -> tuple[int, int]:
        return self.groups, self.in_channels // self.groups

    def _as_images(self, input: Tensor) -> Tensor:
        return input if input.dim() > 3 else input.unsqueeze(0)


class Decorrelate(_Decorrelated):
    """Decorrelates whole feature maps in front of any layer: ``x = R z``, same shape as the input.

    Args:
        num_features: D, the number of entries of one example (a feature map flattened), or the size
            of the last dimension.
        device: where R lives.
        dtype: R's dtype, at least float32.

    Buffer R: (num_features, num_features), the identity at the start. Loading a checkpoint without
    it sets it to the identity, even where other entries are missing too.

    Raises:
        ValueError: num_features is not a positive int below 2^31.
    """

    _transposed = None

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not is_int(num_features, 1, 2**31 - 1):  # no memory has 2^64 bytes for R
            raise ValueError(
                f"num_features must be a positive int below 2^31, got {num_features!r}"
            )
        nn.Module.__init__(self)
        self.num_features = num_features
        example = torch.empty(0, device=device, dtype=dtype)
        self._register_R(example.device, example.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(N, *features) with prod(features) = num_features, or (..., num_features)."""
        check_tensors(input=input)
        output = functional.decorrelate(self._as_images(input), self.R, ())
        self._passed(input, output)
        return output.reshape(input.shape)

    def reset_parameters(self) -> None:
        """Set R back to the identity: there are no other parameters."""
        self.reset_decorrelation()

    def extra_repr(self) -> str:
        return str(self.num_features)

    def _patch_geometry(self) -> dict[str, Any]:
        return {"kernel_size": ()}

    def _patch_size(self) -> tuple[int, int]:
        return 1, self.num_features

    def _as_images(self, input: Tensor) -> Tensor:
        if input.dim() > 1 and math.prod(input.shape[1:]) == self.num_features:
            return input.reshape(input.shape[0], self.num_features)
        if input.dim() > 0 and input.shape[-1] == self.num_features:
            return input if input.dim() > 1 else input.unsqueeze(0)
        raise ValueError(
            f"input must have {self.num_features} features per example, or in its last dimension, "
            f"got shape {tuple(input.shape)}"
        )
