"""Turning plain models into decorrelated ones and back, in place.

A layer changes its class and gains or loses the buffer R; it stays the same object. Parameters,
hooks, attributes, the training flag, shared references and references held elsewhere (by an
optimiser, by a tied embedding) therefore survive without any bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbp_kernels import nn as dbp_nn
from dbp_kernels.distributed import ignore_in_ddp, unwrap
from dbp_kernels.sampling import recorder_of
from dbp_kernels.selection import Filter, Selection, multiplies, unusable

_DECORRELATED: dict[type[nn.Module], type[dbp_nn._Decorrelated]] = {
    nn.Linear: dbp_nn.DecorLinear,
    nn.Conv1d: dbp_nn.DecorConv1d,
    nn.Conv2d: dbp_nn.DecorConv2d,
    nn.Conv3d: dbp_nn.DecorConv3d,
    nn.ConvTranspose2d: dbp_nn.DecorConvTranspose2d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    decorrelated: plain for plain, decorrelated in _DECORRELATED.items()
}


def decorrelated_class(module: nn.Module) -> type[dbp_nn._Decorrelated] | None:
    """The decorrelated class of a layer, or the one a plain layer would get; None for others."""
    if dbp_nn.is_decorrelated(module):
        return type(module)
    return _DECORRELATED.get(type(module))


def decorrelate_model(
    model: nn.Module, include: Filter = None, exclude: Filter = None, report: bool = False
) -> nn.Module:
    """Decorrelate the plain layers of a model, in place; its outputs stay what they are (R = I).

    Swapped are modules whose type is exactly Linear, Conv1d, Conv2d, Conv3d or ConvTranspose2d of
    torch.nn. Left alone are subclasses (`MultiheadAttention.out_proj` is one: attention reads its
    weight directly), lazy layers, layers whose weight is not a plain parameter (weight_norm,
    spectral_norm, pruning, parametrisations), layers that ``dbp.attach`` has, and layers whose
    ``forward`` has been replaced on the instance (LoRA and offloading hooks do so): it may read the
    weight and ignore R. Layers that are decorrelated already stay as they are, so calling it twice
    does no harm.

    `torch.nn.TransformerEncoderLayer` has a fast path for evaluation that reads the weights of its
    linear layers directly and would ignore R. It is switched off for those whose linear layers are
    decorrelated (and `TransformerEncoder`'s nested tensors with it, so padded positions are
    computed rather than zeroed); `fuse_model` switches it on again.

    R takes D x D floats: consider ``exclude`` for linear layers with tens of thousands of inputs.

    Args:
        model: the model, or a single plain layer.
        include: layers to decorrelate; all by default. A name (of the layer or of a module around
            it, shell patterns allowed: ``"layer4"``, ``"*.conv1"``), a type, a module (with all
            in it), a callable ``(name, module) -> bool``, or several of these.
        exclude: layers to leave alone, in the same form; wins over ``include``.
        report: print a table of the decorrelated layers with the shape of R and its MiB, and of
            those left alone, with the reason.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: model is no module, report no bool, or include/exclude has another form. Nothing is
            changed.
        ValueError: a name in include/exclude matches no module, or a layer has an attribute R of
            its own. Nothing is changed.
    """
    check_model(model)
    if not isinstance(report, bool):
        raise TypeError(f"report={report!r}: expected True or False")
    selection = Selection(unwrap(model), include, exclude)
    chosen: dict[str, nn.Module] = {}
    left_alone: dict[str, str] = {}
    for module, names in selection.names.items():
        reason = why_not(module) or selection.why_not(module)
        if reason is None:
            chosen[names[0]] = module
        elif multiplies(module):
            left_alone[names[0]] = reason
    R = identities(chosen)
    make_decorrelated(R)
    settle(model)
    if report:
        print(_table({name: R[module] for name, module in chosen.items()}, left_alone))
    return model


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot be decorrelated, in words; None if it can."""
    if dbp_nn.is_decorrelated(module):
        return "decorrelated already"
    sites = (getattr(hook, "site", None) for hook in module._forward_hooks.values())
    if any(site is not None and recorder_of(site) is not None for site in sites):
        return "dbp.attach has its R"
    if type(module) not in _DECORRELATED:
        return f"{type(module).__name__} is no kind that dbp.nn has decorrelated"
    return unusable(module, "weight")


def identities(layers: Mapping[str, nn.Module]) -> dict[nn.Module, Tensor]:
    """The identity for each of the plain layers, by their names, that are to be decorrelated.

    Made before anything changes: memory may not suffice. Raises ValueError for an attribute R of
    the layer's own.
    """
    for name, module in layers.items():
        if hasattr(module, "R"):
            raise ValueError(f"layer {name!r} has an attribute R already: exclude it")
    return {module: _identity(module) for module in layers.values()}


def make_decorrelated(R: Mapping[nn.Module, Tensor]) -> None:
    """Plain layers become decorrelated ones, each with its R; ``settle`` is to follow."""
    for module, own in R.items():
        _become(module, _DECORRELATED[type(module)])
        module.register_buffer("R", own)


def make_plain(modules: Iterable[nn.Module]) -> None:
    """Decorrelated layers become plain ones, without R; ``settle`` is to follow."""
    for module in filter(dbp_nn.is_decorrelated, modules):
        recorder = recorder_of(module)
        if recorder is not None:
            recorder.release()
        for attribute in dbp_nn.OF_THE_OPTIMISER:
            module.__dict__.pop(attribute, None)
        del module.R
        _become(module, _PLAIN[type(module)])


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    # Code compiled before looks at the class again only when __dict__ has been written to.
    module.__dict__["_dbp_changed"] = True
    del module.__dict__["_dbp_changed"]


def settle(model: nn.Module) -> None:
    """What holds for a whole model, once its layers have changed."""
    switch_fast_paths(model)
    ignore_in_ddp(model)
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if _checks(hook)]:
            del hooks[key]
    inner = unwrap(model)
    if any(map(dbp_nn.is_decorrelated, inner.modules())):
        inner.register_load_state_dict_pre_hook(dbp_nn.check_loaded)


def _checks(hook: Any) -> bool:
    return getattr(hook, "hook", None) is dbp_nn.check_loaded


def _table(R: Mapping[str, Tensor], left_alone: Mapping[str, str]) -> str:
    """Layers with their R, then layers with the reason why they have none."""
    rows = [("decorrelated", "R", "MiB")]
    rows += [(name or "the model", shape_of(x), f"{mib(x):.2f}") for name, x in R.items()]
    rows.append(("total", "", f"{sum(map(mib, R.values())):.2f}"))
    first, second, third = (max(map(len, column)) for column in zip(*rows))
    lines = [f"{name:{first}}  {shape:{second}}  {size:>{third}}" for name, shape, size in rows]
    if left_alone:
        named = [(name or "the model", reason) for name, reason in left_alone.items()]
        width = max(len(name) for name, _ in named)
        lines += ["left alone", *(f"{name:{width}}  {reason}" for name, reason in named)]
    return "\n".join(lines)


def shape_of(x: Tensor) -> str:
    """As in "2 x 18 x 18"."""
    return " x ".join(map(str, x.shape))


def mib(x: Tensor) -> float:
    """What a tensor's elements take, in MiB."""
    return x.nbytes / 2**20


@torch.no_grad()
def fuse_model(model: nn.Module) -> nn.Module:
    """Turn decorrelated layers into plain ones that hold the condensed weight A = W R, in place.

    Outputs stay equal, up to rounding; the state_dict becomes that of the plain model. A fused
    layer gets a new weight Parameter: a weight it was tied to (an embedding, a shared Parameter)
    keeps its value, and the tie ends unless R is exactly the identity. If training continues, make
    optimisers and DistributedDataParallel anew. A `Decorrelate` module has no layer of its own to be fused into and stays.

    Args:
        model: the model, or a single decorrelated layer.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: model is no module.
        ValueError: a decorrelated layer cannot be fused: it is a subclass, its weight is not a
            plain parameter (weight_norm, pruning, parametrisations), or its ``forward`` has been
            replaced on the instance; remove those first. Nothing is changed.
    """
    check_model(model)
    weights: dict[nn.Module, nn.Parameter] = {}
    for name, module in unwrap(model).named_modules():
        if not dbp_nn.is_decorrelated(module) or isinstance(module, dbp_nn.Decorrelate):
            continue
        if type(module) not in _PLAIN:
            raise ValueError(
                f"cannot fuse layer {name!r}: {type(module).__name__} is a subclass of a "
                "decorrelated layer; expected the layer itself (remove parametrisations first)"
            )
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"cannot fuse layer {name!r}: its weight is not a plain parameter; remove "
                "weight_norm, spectral_norm or pruning first"
            )
        if "forward" in module.__dict__:  # it calls the decorrelated class's, which needs R
            raise ValueError(
                f"cannot fuse layer {name!r}: its forward has been replaced on the instance; "
                "remove what has done so (a hook, an adapter) first"
            )
        weights[module] = _fused(weight, module)

    for layer, fused in weights.items():
        layer._parameters["weight"] = fused
    make_plain(weights)
    settle(model)
    return model


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _identity(module: Any) -> Tensor:
    """The first R of a plain layer."""
    # The sizes come from attributes that the plain layer has too.
    groups, size = _DECORRELATED[type(module)]._patch_size(module)
    return dbp_nn.identity_R(groups, size, module.weight.device, module.weight.dtype)


def _fused(weight: nn.Parameter, module: dbp_nn._Decorrelated) -> nn.Parameter:
    A = dbp_nn.fused_weight(weight, module.R, bool(module._transposed))
    if A is weight:
        return weight
    fused = nn.Parameter(A, weight.requires_grad)
    fused.__dict__.update(weight.__dict__)  # marks that frameworks put on parameters
    return fused


def switch_fast_paths(model: nn.Module) -> None:
    """Give transformer layers their fast path exactly where it would be right.

    `torch.nn.TransformerEncoderLayer` reads its linear layers' weights directly in evaluation.
    """
    slow = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            linears = (getattr(module, "linear1", None), getattr(module, "linear2", None))
            decorrelated = any(isinstance(m, dbp_nn.DecorLinear) for m in linears)
            # 0 means "neither relu nor gelu": the slow path, which calls the layers.
            _override(module, "activation_relu_or_gelu", 0, decorrelated)
            if decorrelated:
                slow.add(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            decorrelated = any(layer in slow for layer in module.layers)
            _override(module, "use_nested_tensor", False, decorrelated)


def _override(module: nn.Module, attribute: str, value: object, on: bool) -> None:
    """Set an attribute while ``on``, and give it its own value back afterwards."""
    keep = f"_dbp_{attribute}"
    if on and not hasattr(module, keep):
        setattr(module, keep, getattr(module, attribute))
        setattr(module, attribute, value)
    elif not on and hasattr(module, keep):
        setattr(module, attribute, getattr(module, keep))
        delattr(module, keep)
