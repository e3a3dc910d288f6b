"""The first argument and the options of ``DecorUpdate``: parsed and checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dbp_kernels import distributed, rules
from dbp_kernels.loaded import why_no_tensor
from dbp_kernels.nn import is_decorrelated
from dbp_kernels.optim.site import Site
from dbp_kernels.precision import MATMUL_PRECISIONS
from dbp_kernels.sampling import Layer

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_SAMPLINGS = ("first", "random")
COSTS = ("measured", "planned")  # where a budget's come from

_Layers = dict[str, Layer]


def as_groups(model: Any) -> list[dict[str, Any]]:
    if isinstance(model, nn.Module):
        return [{"modules": model}]
    if isinstance(model, dict) or not are_several(model):
        raise TypeError(
            f"model={type(model).__name__}: expected a torch.nn.Module, an iterable of modules, or "
            "a list of groups {'modules': ..., 'lr': ...}"
        )
    entries = list(model)
    if entries and all(isinstance(entry, dict) for entry in entries):
        return list(map(_lasting, entries))
    return [{"modules": entries}]


def _lasting(group: dict[str, Any]) -> dict[str, Any]:
    """The group, whose modules are looked at twice: to check them, and to take them."""
    modules = group.get("modules")
    return {**group, "modules": list(modules)} if isinstance(modules, Iterator) else group


def are_several(value: Any) -> TypeIs[Iterable[Any]]:
    """Whether it is an iterable of what may be modules or groups."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor))


def parse_group(group: Any, defaults: dict[str, Any]) -> tuple[dict[str, Any], _Layers]:
    """(options, layers by name) of one group."""
    if not isinstance(group, dict) or "modules" not in group:
        raise TypeError(f"group={group!r}: expected a dict with the key 'modules'")
    options = {key: value for key, value in group.items() if key != "modules"}
    unknown = set(options) - set(defaults) - {"initial_lr"}
    if unknown:
        raise ValueError(f"group has unknown options {sorted(unknown)}: expected {list(defaults)}")
    layers: _Layers = {}
    for name, layer in _decorrelated_layers(group["modules"]):
        if layer in layers.values():
            continue
        if name in layers:
            raise ValueError(f"two layers are called {name!r}: expected a name for each")
        check_R(name, layer)
        layers[name] = layer
    if not layers:
        raise ValueError(
            "found no decorrelated layer in the model or group: expected layers of "
            "dbp_kernels.nn; call dbp_kernels.decorrelate_model(model) first"
        )
    return checked_options({**defaults, **options}), layers


def _decorrelated_layers(modules: Any) -> Iterator[tuple[str, Layer]]:
    """Names and layers of a module, or of an iterable of modules or (name, module) pairs."""
    if isinstance(modules, nn.Module):
        for name, module in distributed.unwrap(modules).named_modules():
            if is_decorrelated(module):
                yield name or type(module).__name__, module
        return
    if not are_several(modules):
        raise TypeError(f"modules={modules!r}: expected a torch.nn.Module or several")
    for index, entry in enumerate(modules):
        name, module = entry if isinstance(entry, tuple) and len(entry) == 2 else (index, entry)
        if isinstance(module, Site):
            yield str(name), module
            continue
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules contains {entry!r}: expected a torch.nn.Module")
        for inner, layer in distributed.unwrap(module).named_modules():
            if is_decorrelated(layer):
                yield ".".join(filter(None, (str(name), inner))) or type(layer).__name__, layer


def check_groups(groups: list[tuple[Any, _Layers]]) -> None:
    seen: dict[Layer, str] = {}
    for _, layers in groups:
        for name, layer in layers.items():
            if layer in seen:
                raise ValueError(
                    f"layer {name!r} is in more than one group (also as {seen[layer]!r}): expected "
                    "every layer once"
                )
            seen[layer] = name
    check_own_R((name, layer) for layer, name in seen.items())


def check_R(name: str, layer: Layer) -> None:
    """Raises TypeError or ValueError if a layer's R, which may have been set by hand, is none."""
    groups, size = layer._patch_size()
    reason = why_no_tensor(layer.R, (groups, size, size) if groups > 1 else (size, size))
    if reason is not None:
        kind = ValueError if reason.startswith("of shape") else TypeError
        raise kind(f"R of layer {name!r} {reason}")


def check_own_R(layers: Iterable[tuple[str, Layer]]) -> None:
    """Raises ValueError if two layers have one R: its update would be made twice.

    But for sites of ``attach``, whose R is shared where that is exact.
    """
    seen: dict[Any, str] = {}
    for name, layer in layers:
        R = getattr(layer, "R", None)  # a fused layer has lost it
        if R is None or isinstance(layer, Site) or not R.numel():
            continue
        other = seen.setdefault(id(R) if R.is_meta else (R.device, R.data_ptr()), name)
        if other != name:
            raise ValueError(
                f"layers {other!r} and {name!r} have one R: expected an R for each (dbp.attach shares "
                "R among layers that are fed by the same tensor)"
            )


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    # costs are divided by it: beyond 64 bits it may be no float
    return _is_number(value, Integral) and 1 <= value < 2**63


_LARGEST = torch.finfo(torch.float32).max  # torch raises where float32 is to be scaled by more


def is_rate(value: Any) -> bool:
    """Whether it is a learning rate that updates can take."""
    return _is_number(value, Real) and 0 <= value <= _LARGEST


def _is_one_of(values: Collection[str]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in values


# For each option: what it is turned into, whether a value is valid, and what is.
_OPTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool], str]] = {
    "lr": (float, is_rate, f"a finite number from 0 to {_LARGEST:.3g}"),
    "initial_lr": (float, is_rate, f"a finite number from 0 to {_LARGEST:.3g}"),  # of schedulers
    "kappa": (float, lambda v: _is_number(v, Real) and 0 <= v <= 1, "a number from 0 to 1"),
    "sample": (
        lambda v: int(v) if isinstance(v, Integral) else float(v),
        lambda v: (
            _is_count(v) or (not isinstance(v, Integral) and _is_number(v, Real) and 0 < v <= 1)
        ),
        "a fraction above 0 and up to 1 (float), or a number of images of at least 1 (int)",
    ),
    "rule": (str, _is_one_of(rules.RULES), f"one of {rules.RULES}"),
    "update_every": (int, _is_count, "an int of at least 1"),
    "demean": (bool, lambda v: isinstance(v, bool), "True or False"),
    "budget": (
        lambda v: None if v is None else float(v),
        lambda v: v is None or (_is_number(v, Real) and 0 < v < 1),
        "None, or a share of the training step above 0 and below 1",
    ),
    "costs": (str, _is_one_of(COSTS), f"one of {COSTS}"),
    "matmul_precision": (
        lambda v: v,
        lambda v: v is None or _is_one_of(tuple(MATMUL_PRECISIONS))(v),
        f"None or one of {tuple(MATMUL_PRECISIONS)}",
    ),
    "clip": (
        lambda v: None if v is None else float(v),
        lambda v: v is None or (_is_number(v, Real) and 0 < v < 1),
        "None, or a number above 0 and below 1",
    ),
    "stagger": (bool, lambda v: isinstance(v, bool), "True or False"),
    "cuda_graph": (bool, lambda v: isinstance(v, bool), "True or False"),
    "sampling": (str, _is_one_of(_SAMPLINGS), f"one of {_SAMPLINGS}"),
}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options as plain Python values; names it does not know pass through.

    Raises ValueError naming the option, its value and what was expected.
    """
    checked = dict(options)
    for name in options:
        if name not in _OPTIONS:
            continue
        convert, valid, expected = _OPTIONS[name]
        given = options[name]
        if name in ("lr", "initial_lr") and isinstance(given, Tensor) and given.dim() == 0:
            given = math.nan if given.is_meta else given.item()  # the value it has now
        if not valid(given):
            raise ValueError(f"{name}={options[name]!r}: expected {expected}")
        checked[name] = convert(given)
    return checked
