"""How deep one step goes, and through how many of the package's modules: what a reader has to follow.

Counted by ``sys.setprofile`` over one warm ``step()``: a frame is a call of a function of the package
(comprehensions and generator expressions, which some versions of Python inline, are none) that is on
the stack at the same time as the others; modules are those of the deepest stack, which is what has
to be read to follow the step down to its innermost call. All modules in which anything ran are
counted beside. ``__init__`` files are left out.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import choose
from dbp_kernels.planning.choice import Choice

PACKAGE = Path(dbp.__file__).parent
Frame = tuple[str, str]  # module, function


def net() -> nn.Module:
    """Layers of several sizes, so that a step takes several plans and algorithms."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


def attached() -> tuple[nn.Module, Callable[[], object]]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dbp.attach(model, optimizer, lr=1e-3, sample=1.0)
    return model, optimizer.step


def decorrelated() -> tuple[nn.Module, Callable[[], object]]:
    model = dbp.decorrelate_model(net())
    return model, dbp.DecorUpdate(model, lr=1e-3, sample=1.0).step


def measure(step: Callable[[], object]) -> tuple[list[Frame], set[str]]:
    """(the deepest stack of the package's frames, outermost first; the modules of all)."""
    deepest: list[Frame] = []
    modules: set[str] = set()

    def profile(frame, event, argument):
        nonlocal deepest
        if event != "call" or (place := _place(frame)) is None:
            return
        modules.add(place[0])
        stack = []
        while frame is not None:
            stack.append(_place(frame))
            frame = frame.f_back
        stack = [place for place in reversed(stack) if place is not None]
        if len(stack) > len(deepest):
            deepest = stack

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return deepest, modules


def _place(frame) -> Frame | None:
    path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
    if PACKAGE not in path.parents or path.stem == "__init__" or function.startswith("<"):
        return None
    return str(path.relative_to(PACKAGE).with_suffix("")), function


def force(way: str, monkeypatch) -> None:
    """Every layer takes this algorithm for S, or this plan, whatever the planner thinks."""

    def update(x, geometry, backend):
        if way in ("direct", "samples"):
            return Choice(way, 0.0, 0.0)
        shift = way == "shift" and not geometry.pointwise
        gram = Choice("shift" if shift else "unfold", 0.0, 0.0, (False,) * len(geometry.axes))
        return Choice("gram", 0.0, 0.0, gram=gram)

    monkeypatch.setattr(choose, "update", update)


# Frames, modules of the deepest stack, all modules. An attached step comes through two more frames
# than one of a DecorUpdate: the method put on the optimiser, and the handle's hook.
@pytest.mark.parametrize("way", ["the planner's", "shift", "unfold", "direct", "samples"])
@pytest.mark.parametrize(("form", "bounds"), [(attached, (11, 8, 34)), (decorrelated, (9, 8, 24))])
def test_a_step_is_no_deeper_than_this(form, bounds, way, monkeypatch):
    torch.manual_seed(0)
    if way != "the planner's":
        force(way, monkeypatch)
    model, step = form()
    for turn in range(3):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8))
        loss.backward()
        if turn < 2:
            step()
    stack, modules = measure(step)
    found = len(stack), len({module for module, _ in stack}), len(modules)
    print(
        f"{form.__name__}, {way}: {found[0]} frames in {found[1]} modules of {found[2]}"
    )  # -rP shows
    print("\n".join(f"  {'  ' * depth}{m}.{f}" for depth, (m, f) in enumerate(stack)))
    assert found[0] >= 5  # it has measured something
    assert all(one <= bound for one, bound in zip(found, bounds)), (found, sorted(modules))
