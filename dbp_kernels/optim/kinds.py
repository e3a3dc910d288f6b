"""Kinds of layers that can be attached: how each one sees its input as patches, and its weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dbp_kernels.selection import unusable


def _first(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    input: Tensor = arguments[0] if arguments else next(iter(named.values()))
    return input


@dataclass(frozen=True)
class Patches:
    """How a layer sees its input.

    Attributes:
        size: D, the entries of one patch of one group.
        weight: the name of the parameter that multiplies the patches.
        window: arguments of ``dbp.patch_gram`` by which the statistics see the patches: kernel_size,
            and stride, padding, dilation, groups, padding_mode where they are not the defaults.
        transposed: the weight is (groups * D, ...), the patch along its first dimension, as in
            transposed convolutions; else (groups * out, ...), each row a patch's D entries.
        input: what finds the input (N, ...) among a call's arguments and named arguments; None where
            the call shows no input to learn from. By default the first one.
    """

    size: int
    weight: str = "weight"
    window: dict[str, Any] = field(default_factory=lambda: {"kernel_size": ()})
    transposed: bool = False
    input: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] = _first

    @property
    def groups(self) -> int:
        groups: int = self.window.get("groups", 1)
        return groups

    @property
    def dims(self) -> int:
        """Spatial dimensions; 0 for an input (..., D)."""
        return len(self.window["kernel_size"])


Describe = Callable[[Any], Patches | str]  # of a module of a type that is registered with it


def _linear(module: nn.Linear) -> Patches:
    return Patches(module.in_features)


def _convolution(module: Any) -> Patches:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    size = module.in_channels // module.groups * math.prod(module.kernel_size)
    return Patches(size, window={name: getattr(module, name) for name in names})


def _transposed(module: Any) -> Patches:
    """The patch is one pixel's channels, whatever the window."""
    window = {"kernel_size": (1,) * len(module.kernel_size), "groups": module.groups}
    return Patches(module.in_channels // module.groups, window=window, transposed=True)


def _attention(module: nn.MultiheadAttention) -> Patches | str:
    """Its packed projection of query, key and value, where these are one and the same."""
    if module.in_proj_weight is None:
        return "its projections of query, key and value have weights of their own"

    def find(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        given: dict[str, Tensor] = dict(zip(("query", "key", "value"), arguments)) | named
        query, key, value = given["query"], given["key"], given["value"]
        if not (query is key is value):
            return None
        return query if module.batch_first or query.dim() < 3 else query.transpose(0, 1)

    return Patches(module.embed_dim, weight="in_proj_weight", input=find)


def _uncalled(module: nn.Module) -> str:
    return "attention uses its weight without calling it, so that its input is not seen"


_kinds: dict[type[nn.Module], Describe] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.MultiheadAttention: _attention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _uncalled,
}


def register(kind: type[nn.Module], describe: Describe) -> None:
    """Have ``dbp.attach`` attach modules of exactly this type as well.

    Args:
        kind: a type of module whose ``forward`` multiplies patches of its first argument by a
            parameter, and uses that parameter for nothing else.
        describe: gives a module's `Patches`, or a reason, in words, to leave it alone. For a layer
            ``y = x @ weight`` of weight (D, out)::

                dbp.register(MyLinear, lambda m: dbp.Patches(m.weight.shape[0], transposed=True))

    Raises:
        TypeError: kind is no type of module, or describe is not callable.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind={kind!r}: expected a subclass of torch.nn.Module")
    if not callable(describe):
        raise TypeError(f"describe={describe!r}: expected a callable module -> dbp.Patches")
    _kinds[kind] = describe


def patches_of(module: nn.Module) -> Patches | str | None:
    """What the module sees; a reason to leave it alone; None if its type is not a known one."""
    describe = _kinds.get(type(module)) or _optional(type(module))
    if describe is None:
        return _changed(module)
    patches = describe(module)
    if isinstance(patches, str):
        return patches
    return unusable(module, patches.weight) or _unfit(patches, module._parameters[patches.weight])


def _changed(module: nn.Module) -> str | None:
    """Why a module is left alone whose type torch has made another; None if it has not."""
    if is_parametrized(module):
        names = ", ".join(dict(module.get_submodule("parametrizations").named_children()))
        return f"its {names} is parametrised"
    for name, parameter in module._parameters.items():
        if parameter is not None and _is_dtensor(parameter) and parameter.dim() > 1:
            return _sharded(name)
    return None


def _is_dtensor(parameter: Tensor) -> bool:
    return type(parameter).__name__ == "DTensor"  # known without importing it


def _sharded(name: str) -> str:
    return f"its {name} is a DTensor, sharded beforehand"


def _unfit(patches: Patches, weight: Tensor | None) -> str | Patches:
    if weight is not None and _is_dtensor(weight):
        return _sharded(patches.weight)
    if type(weight) is not nn.Parameter:
        return f"its {patches.weight} is a {type(weight).__name__}"
    if weight.numel() == 0:
        return f"its {patches.weight} is empty: sharded beforehand?"
    rows = patches.groups * patches.size
    fits = weight.shape[0] == rows if patches.transposed else weight[0].numel() == patches.size
    if not fits or patches.size == 0:
        return (
            f"its {patches.weight} of shape {tuple(weight.shape)} does not have patches of {rows}"
        )
    return patches


def _optional(kind: type[nn.Module]) -> Describe | None:
    """transformers' Conv1D is a linear layer with its weight (in, out); known without importing it."""
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return lambda module: Patches(module.weight.shape[0], transposed=True)
    return None
