"""Which layers are meant: ``include`` and ``exclude``, and why a layer is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Rule = str | type | nn.Module | Callable[[str, nn.Module], bool]
Filter = Rule | Iterable[Rule] | None


class Selection:
    """The layers of a model that ``include`` and ``exclude`` leave.

    Raises TypeError or ValueError, naming the argument, if it has another form or a name in it
    matches no module.

    Attributes:
        names: all names of each module, in the model's order.
    """

    def __init__(self, model: nn.Module, include: Filter, exclude: Filter) -> None:
        self.names = aliases_of(model)
        self._included = None if include is None else Rules("include", include)
        self._excluded = Rules("exclude", exclude)
        for rules in (self._included, self._excluded):
            if rules is not None:
                rules.check(self.names)

    def why_not(self, module: nn.Module) -> str | None:
        """Why the module is left alone, in words; None where it is not."""
        aliases = self.names[module]
        if self._included is not None and not any(self._included(n, module) for n in aliases):
            return "not among include"
        if any(self._excluded(name, module) for name in aliases):
            return "among exclude"
        return None


def multiplies(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own: leaving it alone is then worth a word."""
    own = [p for p in module._parameters.values() if p is not None]
    return any(is_lazy(p) or p.dim() > 1 for p in own)


def unusable(module: nn.Module, name: str) -> str | None:
    """Why the module's parameter ``name`` cannot hold, or be part of, A = W R; None if it can."""
    # weight_norm, spectral_norm and pruning keep the class but move the parameter
    weight = module._parameters.get(name)
    if weight is None:
        return f"its {name} is not a plain parameter"
    if is_lazy(weight):
        return "it is lazy: run a forward pass first"
    if not weight.is_floating_point():
        return f"its {name} is {weight.dtype}"
    if "forward" in module.__dict__:  # by adapters and offloading hooks
        return "its forward has been replaced on the instance, and may not use the weight"
    return None


def aliases_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


class Rules:
    """An argument such as ``include``: one or several rules, by each of which layers are meant."""

    def __init__(self, argument: str, given: Filter) -> None:
        self.argument = argument
        self.rules: list[Rule]
        if given is None:
            self.rules = []
        elif isinstance(given, Iterable) and not isinstance(given, (str, type, nn.Module, Tensor)):
            self.rules = list(given)
        else:
            self.rules = [given]  # type: ignore[list-item]  # a tensor is refused below
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
