"""Checkpoints of the layer form: fused into the plain model's, or loaded into a plain model."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dbp_kernels import user_warnings
from dbp_kernels.loaded import StateError, why_no_R
from dbp_kernels.nn import TRANSPOSED, check_loaded, fused_weight, is_decorrelated
from dbp_kernels.selection import aliases_of
from dbp_kernels.surgery import (
    check_model,
    decorrelated_class,
    identities,
    make_decorrelated,
    make_plain,
    settle,
    why_not,
)


def load_decorrelated(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint of decorrelated layers into a plain model, which becomes decorrelated.

    For what builds plain models by itself: transformers' ``from_pretrained``, say, would drop every
    R. The layers that have an R in ``state_dict`` are decorrelated, and everything is loaded,
    strictly. Layers that are decorrelated already and have none there get R = I.

    Args:
        model: a plain model, or one with some of its layers decorrelated; changed in place.
        state_dict: of a model decorrelated by ``decorrelate_model``. A weight that several layers
            share may be there under the name of one of them.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: model is no module, or state_dict no mapping of names to tensors.
        ValueError: there is an R of a layer that the model does not have, or that cannot be
            decorrelated, or an R that is not finite or has rows longer than `loaded.MAX_NORM`; or the
            model has lazy layers.
        RuntimeError: keys are missing or not expected, or shapes differ, as in
            ``torch.nn.Module.load_state_dict``.

        Whatever is raised, model is as it was.
    """
    check_model(model)
    _check(state_dict)
    state = _with_shared(state_dict, model)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, str] = {}
    for key in _R_keys(state):
        module = _module_of(key, modules)
        if is_decorrelated(module) or _has_R(module):
            continue
        if why_not(module) is not None:
            raise _unexpected(key, module)
        layers.setdefault(module, key[:-2])
    R = identities({name: module for module, name in layers.items()})
    make_decorrelated(R)
    try:
        check_loaded(model, state)
        # copies nothing, but raises what there is to be raised
        with _without_memory(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given below
            model.load_state_dict(_like(state, lambda x: x.to("meta")))
    except BaseException:
        make_plain(R)
        raise
    settle(model)
    model.load_state_dict(state)
    return model


def fuse_state_dict(
    state_dict: Mapping[str, Any], model: nn.Module | None = None
) -> OrderedDict[str, Any]:
    """The plain model's state_dict, with weights A = W R, from that of decorrelated layers.

    For checkpoints whose model is not at hand; with the model, load them and call ``fuse_model``.
    Layers are told apart by the kind that ``state_dict()`` notes beside its entries (torch.save
    keeps it; safetensors and dict comprehensions do not), by ``model``, or by the shapes of weight
    and R where they leave no doubt. Entries of a `Decorrelate` module stay, as in ``fuse_model``.

    Args:
        state_dict: name to tensor, from a model's ``state_dict()``; it is not changed.
        model: the model it belongs to, decorrelated or plain, on any device; its values are not
            used.

    Returns:
        A new dict. Weights are in their own dtype, of products of at least float32; where R is
        exactly the identity, and for all other entries, they are those of ``state_dict``.

    Warns (UserWarning) of a fused weight that another layer shares, which keeps W: a model that ties
    the two cannot hold both.

    Raises:
        TypeError: state_dict is no mapping of names to tensors, or model is no module.
        ValueError: an R does not fit its weight, or has none (weight_norm, pruning), is not finite or
            has rows longer than `loaded.MAX_NORM`; or it cannot be told of what kind its layer is:
            expected ``model``.
    """
    if model is not None:
        check_model(model)
    _check(state_dict)
    state = state_dict if model is None else _with_shared(state_dict, model)
    tell = _tell_by(state, model)
    fused = _like(state)
    weights: dict[tuple[int, int], Tensor] = {}  # shared layers stay shared
    for key in _R_keys(state):
        transposed = tell(key)
        if transposed is None:
            continue
        W, R = _weight_of(state, key), fused.pop(key)
        if not _fits(W, R, transposed):
            raise ValueError(
                f"state_dict[{key!r}] of shape {tuple(R.shape)} does not fit the weight of "
                f"{W.dtype} and shape {tuple(W.shape)}: expected (D, D) or (groups, D, D) for "
                f"patches of D entries"
            )
        reason = why_no_R(R, R.shape)
        if reason is not None:
            raise StateError(f"state_dict[{key!r}] {reason}")
        both = (id(W), id(R)) if W.is_meta else (W.data_ptr(), R.data_ptr())
        if both not in weights:
            weights[both] = fused_weight(W, R, transposed)
        fused[_weight_key(key)] = weights[both]
    _warn_of_ties(state, fused)
    for entry in getattr(fused, "_metadata", {}).values():
        entry.pop(TRANSPOSED, None)
    return fused


# Of what kind a layer is: True where its weight is transposed, None where R is not to be fused.


def _tell_by(
    state_dict: Mapping[str, Any], model: nn.Module | None
) -> Callable[[str], bool | None]:
    """What tells the kind of the layer that an R, by its key, belongs to."""
    if model is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        return lambda key: _by_model(key, modules)
    notes = {
        name: entry[TRANSPOSED]
        for name, entry in getattr(state_dict, "_metadata", {}).items()
        if TRANSPOSED in entry
    }
    if notes:  # an R without a note is somebody else's
        return lambda key: notes.get(key[:-2])
    return lambda key: _by_shape(key, _weight_of(state_dict, key), state_dict[key])


def _by_model(key: str, modules: Mapping[str, nn.Module]) -> bool | None:
    module = _module_of(key, modules)
    decorrelated = decorrelated_class(module)
    if decorrelated is not None:
        return decorrelated._transposed
    if _has_R(module):
        return None
    raise _unexpected(key, module)


def _by_shape(key: str, W: Tensor, R: Tensor) -> bool:
    ways = [way for way in (False, True) if _fits(W, R, way)]
    if len(ways) == 1:
        return ways[0]
    told = "fits in two ways" if ways else "does not fit"
    raise ValueError(
        f"state_dict[{key!r}] of shape {tuple(R.shape)} {told} the weight of shape "
        f"{tuple(W.shape)}, and there is no note of the layer's kind (state_dict._metadata): "
        "expected model= as well"
    )


def _fits(W: Tensor, R: Tensor, transposed: bool) -> bool:
    """Whether R can be that of a layer of weight W."""
    if W.dim() < 2 or not W.is_floating_point() or R.dim() not in (2, 3):
        return False
    groups, size = (R.shape[0] if R.dim() == 3 else 1), R.shape[-1]
    if R.shape[-2] != size:
        return False
    if transposed:  # of two dimensions in space, as DecorConvTranspose2d
        return W.dim() == 4 and W.shape[0] == groups * size
    return W.shape[0] % groups == 0 and W[0].numel() == size


# Entries, and the modules they are of.


def _module_of(key: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    name = key[:-2]
    if name not in modules:
        raise ValueError(f"state_dict has {key!r}, but model has no layer {name!r}")
    return modules[name]


def _unexpected(key: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"state_dict has {key!r}, but layer {key[:-2]!r} cannot be decorrelated: {why_not(module)}"
    )


def _check(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        extra = isinstance(key, str) and key.split(".")[-1] == "_extra_state"
        if not isinstance(key, str) or not (extra or isinstance(value, Tensor)):
            raise TypeError(
                f"state_dict has {key!r}: {type(value).__name__}; expected names and tensors, as "
                "from model.state_dict()"
            )


def _R_keys(state_dict: Mapping[str, Any]) -> list[str]:
    return [key for key in state_dict if key.split(".")[-1] == "R"]


def _weight_key(R_key: str) -> str:
    return R_key[:-1] + "weight"


def _weight_of(state_dict: Mapping[str, Any], key: str) -> Tensor:
    if _weight_key(key) not in state_dict:
        raise ValueError(
            f"state_dict has {key!r}, but no {_weight_key(key)!r}: expected plain weights (without "
            "weight_norm, spectral_norm or pruning), or model= as well, if that weight is another "
            "layer's too or R belongs to a Decorrelate module"
        )
    weight: Tensor = state_dict[_weight_key(key)]
    return weight


def _has_R(module: nn.Module) -> bool:
    """Whether a module has an entry R of its own, that is none of ours."""
    return "R" in module._buffers or "R" in module._parameters


def _like(
    state_dict: Mapping[str, Any], change: Callable[[Tensor], Tensor] = lambda x: x
) -> OrderedDict[str, Any]:
    """A copy, with its notes, of changed tensors."""
    copy: Any = OrderedDict(  # with an attribute
        (key, change(value) if isinstance(value, Tensor) else value)
        for key, value in state_dict.items()
    )
    notes = getattr(state_dict, "_metadata", None)
    if notes is not None:
        copy._metadata = OrderedDict((name, dict(entry)) for name, entry in notes.items())
    return cast("OrderedDict[str, Any]", copy)


def _with_shared(state_dict: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """With every name of what the model shares: safetensors keeps one of them."""
    shared: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(parameter, []).append(name)
    for module, names in aliases_of(model).items():
        for own in ("R", *module._buffers):
            shared[module, own] = [f"{name}.{own}" if name else own for name in names]
    complete = _like(state_dict)
    for names in shared.values():
        found = [name for name in names if name in state_dict]
        if found:
            complete.update((name, state_dict[found[0]]) for name in names if name not in found)
    return complete


def _warn_of_ties(state_dict: Mapping[str, Any], fused: Mapping[str, Any]) -> None:
    """Entries of one memory that no longer are."""
    first: dict[int, str] = {}
    for key, value in state_dict.items():
        if key not in fused or not isinstance(value, Tensor) or value.is_meta or not value.numel():
            continue
        other = first.setdefault(value.data_ptr(), key)
        if fused[key].data_ptr() != fused[other].data_ptr():
            user_warnings.warn(
                f"{key!r} and {other!r} are one weight in state_dict and differ once R is fused: a "
                "model that ties them can hold only one of the two"
            )


@contextmanager
def _without_memory(model: nn.Module) -> Iterator[None]:
    """Within it parameters and buffers are on the meta device; what is done to them is undone."""
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(f"model has the lazy parameter {lazy[0]!r}: run a forward pass first")
    holders: list[dict[str, Any]] = [
        tensors for m in model.modules() for tensors in (m._parameters, m._buffers)
    ]
    kept = [dict(tensors) for tensors in holders]
    try:
        for tensors in holders:
            for name, x in tensors.items():
                tensors[name] = None if x is None else x.detach().to("meta")
        yield
    finally:
        for tensors, before in zip(holders, kept):
            tensors.clear()
            tensors.update(before)
