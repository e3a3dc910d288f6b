"""Turning plain models into decorrelated ones and back, in place.

A layer changes its class and gains or loses the buffer R; it stays the same object. Parameters,
hooks, attributes, the training flag, shared references and references held elsewhere (by an
optimiser, by a tied embedding) therefore survive without any bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dbp_kernels import nn as dbp_nn
from dbp_kernels.distributed import ignore_in_ddp, unwrap
from dbp_kernels.precision import without_autocast
from dbp_kernels.sampling import recorder_of

Rule = str | type | nn.Module | Callable[[str, nn.Module], bool]
Filter = Rule | Iterable[Rule] | None

_DECORRELATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: dbp_nn.DecorLinear,
    nn.Conv1d: dbp_nn.DecorConv1d,
    nn.Conv2d: dbp_nn.DecorConv2d,
    nn.Conv3d: dbp_nn.DecorConv3d,
    nn.ConvTranspose2d: dbp_nn.DecorConvTranspose2d,
}
_PLAIN = {decorrelated: plain for plain, decorrelated in _DECORRELATED.items()}


def decorrelated_class(module: nn.Module) -> type[nn.Module] | None:
    """The decorrelated class of a layer, or the one a plain layer would get; None for others."""
    if dbp_nn.is_decorrelated(module):
        return type(module)
    return _DECORRELATED.get(type(module))


def decorrelate_model(
    model: nn.Module, include: Filter = None, exclude: Filter = None
) -> nn.Module:
    """Decorrelate the plain layers of a model, in place; its outputs stay what they are (R = I).

    Swapped are modules whose type is exactly Linear, Conv1d, Conv2d, Conv3d or ConvTranspose2d of
    torch.nn. Left alone are subclasses (`MultiheadAttention.out_proj` is one: attention reads its
    weight directly), lazy layers, and layers whose weight is not a plain parameter (weight_norm,
    spectral_norm, pruning, parametrisations), and layers whose ``forward`` has been replaced on the
    instance (LoRA and offloading hooks do so): it may read the weight and ignore R. Layers that are decorrelated already stay as they
    are, so calling it twice does no harm.

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

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: model is no module, or include/exclude has another form. Nothing is changed.
        ValueError: a name in include/exclude matches no module, or a layer has an attribute R of
            its own. Nothing is changed.
    """
    _check_model(model)
    included = _Filter("include", include)
    excluded = _Filter("exclude", exclude)
    names = aliases_of(unwrap(model))
    included.check(names)
    excluded.check(names)
    identities = {  # allocated before anything changes
        module: _identity(module, _DECORRELATED[type(module)])
        for module, aliases in names.items()
        if _swappable(module)
        and (include is None or any(included(name, module) for name in aliases))
        and not any(excluded(name, module) for name in aliases)
    }
    for module in identities:
        if hasattr(module, "R"):
            raise ValueError(f"layer {names[module][0]!r} has an attribute R already: exclude it")
    for module, R in identities.items():
        module.__class__ = _DECORRELATED[type(module)]
        module.register_buffer("R", R)
    switch_fast_paths(model)
    ignore_in_ddp(model)
    return model


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
    _check_model(model)
    weights: dict[nn.Module, nn.Parameter] = {}
    for name, module in unwrap(model).named_modules():
        if not dbp_nn.is_decorrelated(module) or isinstance(module, dbp_nn.Decorrelate):
            continue
        if type(module) not in _PLAIN:
            raise ValueError(
                f"cannot fuse layer {name!r}: {type(module).__name__} is a subclass of a "
                "decorrelated layer; expected the layer itself (remove parametrisations first)"
            )
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"cannot fuse layer {name!r}: its weight is not a plain parameter; remove "
                "weight_norm, spectral_norm or pruning first"
            )
        if "forward" in module.__dict__:  # it calls the decorrelated class's, which needs R
            raise ValueError(
                f"cannot fuse layer {name!r}: its forward has been replaced on the instance; "
                "remove what has done so (a hook, an adapter) first"
            )
        weights[module] = _fused_weight(module)

    for module, weight in weights.items():
        recorder = recorder_of(module)
        if recorder is not None:
            recorder.release()
        for attribute in ("_recorder", "_recorder_key"):
            module.__dict__.pop(attribute, None)
        module._parameters["weight"] = weight
        del module.R
        module.__class__ = _PLAIN[type(module)]
    switch_fast_paths(model)
    ignore_in_ddp(model)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _swappable(module: nn.Module) -> bool:
    # Old-style weight_norm, spectral_norm and pruning keep the class but move the parameter.
    weight = module._parameters.get("weight")
    if type(module) not in _DECORRELATED or weight is None or not weight.is_floating_point():
        return False
    return "forward" not in module.__dict__  # a replaced forward would go on without R


def _identity(module: nn.Module, decorrelated: type[nn.Module]) -> Tensor:
    """The first R of a plain layer that is going to be ``decorrelated``."""
    # The sizes come from attributes that the plain layer has too.
    groups, size = decorrelated._patch_size(module)
    return dbp_nn.identity_R(groups, size, module.weight.device, module.weight.dtype)


def _fused_weight(module: nn.Module) -> nn.Parameter:
    weight, R = module.weight, module.R
    identity = dbp_nn.identity_R(*module._patch_size(), R.device, R.dtype)
    if not R.is_meta and torch.equal(R, identity):
        return weight
    with without_autocast(weight):  # nothing to be gained from, for a weight that is kept
        fused = nn.Parameter(module._condense().to(weight.dtype), weight.requires_grad)
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


def aliases_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


class _Filter:
    """The ``include`` or ``exclude`` argument, checked."""

    def __init__(self, argument: str, given: Filter) -> None:
        self.argument = argument
        several = isinstance(given, Iterable) and not isinstance(given, (str, type, nn.Module))
        self.rules = list(given) if several else [] if given is None else [given]
        for rule in self.rules:
            if not isinstance(rule, (str, type)) and not callable(rule):
                raise TypeError(
                    f"{argument}={rule!r}: expected a name or pattern, a type, a module, a "
                    "callable (name, module) -> bool, or several of these"
                )

    def __call__(self, name: str, module: nn.Module) -> bool:
        return any(self._matches(rule, name, module) for rule in self.rules)

    def _matches(self, rule: Rule, name: str, module: nn.Module) -> bool:
        if isinstance(rule, str):
            parts = name.split(".")
            around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            return any(fnmatchcase(outer, rule) for outer in around)
        if isinstance(rule, type):
            return isinstance(module, rule)
        if isinstance(rule, nn.Module):
            return module in set(rule.modules())
        return bool(rule(name, module))

    def check(self, names: dict[nn.Module, list[str]]) -> None:
        """Raise for a pattern that matches nothing: it is a typing error."""
        for rule in self.rules:
            if isinstance(rule, str) and not any(
                fnmatchcase(name, rule) for aliases in names.values() for name in aliases
            ):
                raise ValueError(
                    f"{self.argument}={rule!r} matches no module; expected a name as in "
                    "model.named_modules(), shell patterns allowed"
                )
