"""A user's own model: ``--model package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def function_of(name: str) -> Callable[..., Any]:
    """What "package.module:function" names, a class for example.

    Raises ValueError if the module cannot be imported or has nothing callable of that name.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # "" and ".a" are no names of modules
        raise ValueError(f"model {name!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model {name!r}: {module_name!r} has no function {function_name!r}")
    return function


def build_own(name: str, known: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Calls the function called ``name`` with its options, and what it takes of what is ``known``.

    Raises ValueError as `function_of` does, for an option that it does not take, and if what comes
    back is no ``torch.nn.Module``.
    """
    function = function_of(name)
    parameters = inspect.signature(function).parameters.values()
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes += [*known, *options]
    for key, value in options.items():
        if key not in takes:
            raise ValueError(f"{name} has no option {key!r} (got {value!r}): expected {takes}")
    told = {key: value for key, value in known.items() if key in takes}
    model = function(**told, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model
