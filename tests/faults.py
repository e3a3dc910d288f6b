"""Errors put into the middle of a step, and what has to hold after each of them."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

PACKAGE = str(Path(dbp.__file__).parent)
OPTIMIZERS = str(Path(torch.optim.__file__).parent)


class InjectedError(Exception):
    """No error of anybody's."""


class _Counted:
    """Raises at the n-th call, once: before it is made, or when it has taken effect.

    Attributes:
        calls: so far.
        ours: whether the call that raised was made by the package, and not by torch's optimiser.
    """

    def __init__(self, n: int, after: bool) -> None:
        super().__init__()
        self.n, self.after, self.calls, self.ours = n, after, 0, True

    def _call(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        if self.calls == self.n:
            self.ours = _made_by_us()
            if self.after:
                call()
            raise InjectedError(f"at call {self.n}, {'after' if self.after else 'before'} it")
        return call()


class AtFunction(_Counted, TorchFunctionMode):
    """At a call of torch's Python functions; but torch.no_grad() itself does not survive its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled:
            return func(*args, **(kwargs or {}))
        return self._call(lambda: func(*args, **(kwargs or {})))


class AtOperator(_Counted, TorchDispatchMode):
    """At an operator, within the function that calls it: no version counter has seen its effect."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._call(lambda: func(*args, **(kwargs or {})))


MODES = (AtFunction, AtOperator)


def _made_by_us() -> bool:
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OPTIMIZERS):
            return False
        if file.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


class Small(nn.Module):
    """Layers updated by themselves and together, by every plan, from few samples and from many."""

    def __init__(self, linear: Any, convolution: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(3, 5, 3, padding=1),
            nn.Tanh(),
            convolution(5, 5, 3, groups=5, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            linear(5 * 64, 12),  # 320 samples' entries: a product of few samples, by itself
            nn.Tanh(),
        )
        self.first, self.second = linear(12, 12), linear(12, 3)  # equal ones: together
        self.wide = linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.second(torch.tanh(self.first(self.body(x)))))


@dataclass
class Run:
    """A training, in the layer form or by attach, that can be looked at and saved."""

    attached: bool
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    poison: bool = False  # a batch with a NaN

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        linear, convolution = (
            (nn.Linear, nn.Conv2d) if self.attached else (dnn.DecorLinear, dnn.DecorConv2d)
        )
        self.model = Small(linear, convolution)
        options = {"lr": 0.05, "sample": 1.0, "sampling": "random", **self.options}
        makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
            "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
            "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        }
        self.weights = makers[self.optimizer](self.model.parameters())
        if self.attached:
            self.handle = dbp.attach(self.model, self.weights, **options)
            self.decor: dbp.DecorUpdate = self.handle._engine
            self.step: Callable[[], Any] = self.weights.step
        else:
            self.decor = dbp.DecorUpdate(self.model, **options)
            self.step = self.decor.step

    def forward(self, turn: int) -> None:
        """And backward, from nothing but the turn's number."""
        generator = torch.Generator().manual_seed(turn)
        x = torch.randn(4, 3, 8, 8, generator=generator)
        if self.poison and turn == 1:
            x[0, 0, 0, 0] = float("nan")
        self.weights.zero_grad()
        self.model(x).square().mean().backward()
        if not self.attached:
            self.weights.step()

    def train(self, turns: range) -> None:
        for turn in turns:
            self.forward(turn)
            self.step()

    # What it holds.

    def Rs(self) -> dict[str, Tensor]:
        return {name: layer.R.detach() for name, layer in self.decor._named_layers()}

    def Ws(self) -> dict[str, Tensor]:
        if self.attached:
            return {name: self.handle.W(name) for name in self.Rs()}
        return dict(self.model.named_parameters())

    def counters(self) -> dict[str, Any]:
        """All that ``step()`` counts, reports or plans."""
        packed = self.decor.state_dict()
        packed.pop("param_groups")
        packed.pop("generator")  # of the samples' choice, in the forward pass
        return packed

    def snapshot(self) -> dict[str, Any]:
        copies = {"R": self.Rs(), "W": self.Ws()}
        copied = {k: {n: t.clone() for n, t in v.items()} for k, v in copies.items()}
        return {**copied, "counters": self.counters()}

    @torch.no_grad()
    def check_A(self) -> None:
        """A = W R in all weights, bit for bit."""
        if self.attached:
            for name, site in self.handle._sites.items():
                assert site.W.data_ptr() != site.weight.data_ptr(), name
                assert equal(site.weight.detach(), site.condensed()), f"A of {name}"

    def saved(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "weights": self.weights.state_dict()}
        if not self.attached:
            state["decor"] = self.decor.state_dict()
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, state)

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.weights.load_state_dict(state["weights"])
        if not self.attached:
            self.decor.load_state_dict(state["decor"])

    def again(self) -> "Run":
        return Run(self.attached, self.optimizer, self.options, self.poison)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, in tensors and all that holds them."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))


class Judge:
    """Knows a run's state before a step and after it, and says whether another run's is one of the two.

    Args:
        make: a new run.
        turn: of the step, which all those before it precede.
    """

    def __init__(self, make: Callable[[], Run], turn: int = 1) -> None:
        self.make, self.turn = make, turn
        run = self.ready()
        self.old = run.snapshot()
        run.step()
        self.new = run.snapshot()
        assert not equal(self.old["counters"], self.new["counters"])

    def ready(self) -> Run:
        """A run whose next call is that of ``step()``."""
        run = self.make()
        run.train(range(self.turn))
        run.forward(self.turn)
        return run

    def check(self, run: Run, same_W: bool = True, goes_on: bool = True) -> bool:
        """R, W and counters are all old or all new, and the run goes on; returns whether they are new.

        Args:
            same_W: whether W, too, is old or new: it need not be where torch's own step was left.
            goes_on: whether to save the run, load that into another, and go on with both.
        """
        found = run.snapshot()
        parts = ("R", "counters")
        state = {
            part: [equal(found[part], known[part]) for known in (self.old, self.new)]
            for part in parts
        }
        assert [True] * 2 in [list(pair) for pair in zip(*state.values())], state
        new = all(pair[1] for pair in state.values())
        if same_W:
            for name, W in found["W"].items():
                assert equal(W, self.old["W"][name]) or equal(W, self.new["W"][name]), (
                    f"W of {name}"
                )
        run.check_A()
        if goes_on:
            self.goes_on(run)
        return new

    def goes_on(self, run: Run) -> None:
        other = run.again()
        other.load(run.saved())
        if not run.attached:
            run.decor.discard()  # a signal may have come before step() began
        turns = range(self.turn + 1, self.turn + 3)
        for each in (run, other):
            each.train(turns)
        assert equal(run.snapshot(), other.snapshot())
        assert equal(run.saved()["model"], other.saved()["model"])


@contextlib.contextmanager
def caught(*kinds: type[BaseException]) -> Iterator[list[BaseException]]:
    """Errors of these kinds end here; the list has what came."""
    errors: list[BaseException] = []
    try:
        yield errors
    except kinds as error:
        errors.append(error)
