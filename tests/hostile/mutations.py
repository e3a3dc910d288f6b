"""Valid states with one thing wrong, or several: what a broken or foreign file may hold."""

import copy
import math
import random
from typing import Any

import numpy as np
import torch

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 1.5, -0.5, 0.25, 1e-3, 5e-324, 1e30, -1e30, 1e308),
    *(math.nan, math.inf, -math.inf, 2**31, 2**62, 2**64, -(10**20), 10**400, 1 + 1j),
    *("", "a", "0", "nan", "\ud800", b"x", [], {}, (), [0], [[]], [1, 2], {"a": 1}, {0: 1}),
    *(np.float64(0.5), np.int64(2), np.bool_(True), np.ones(2)),
]
TENSORS = [
    torch.tensor(1),
    torch.tensor(-1),
    torch.tensor(True),
    torch.tensor(0.5),
    torch.tensor(math.nan),
    torch.tensor(1e30),
    torch.zeros(0),
    torch.ones(2, 2),
    torch.eye(3),
    torch.tensor(1.0, device="meta"),
    torch.tensor(1 + 1j),
]


def mutated(state: Any, rng: random.Random) -> Any:
    """A copy of ``state`` (dicts, lists, tensors, plain values) with one to three things wrong."""
    state = copy.deepcopy(state)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(state))
        if not places:
            return state
        _mutate(*rng.choice(places), rng)
    return state


def _places(tree: Any) -> Any:
    """(container, key) of everything in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def _mutate(holder: Any, key: Any, rng: random.Random) -> None:
    what = rng.randrange(10)
    value = holder[key]
    if what == 0:
        del holder[key]
    elif what == 1:
        add = rng.choice(("dbp", "R", "more", 0, "lr", "3"))
        if isinstance(holder, dict):
            holder[add] = copy.deepcopy(rng.choice([*holder.values(), *VALUES]))
        else:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice(holder)))
    elif what == 2 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice((-value, float(value), bool(value), value + 1, 1e9 * value))
    elif what == 3 and isinstance(value, str):
        holder[key] = value[: rng.randrange(len(value) + 1)]  # a truncated file
    elif what == 4:
        others = list(holder.values()) if isinstance(holder, dict) else holder
        holder[key] = copy.deepcopy(rng.choice(others))
    elif isinstance(value, torch.Tensor) and what < 9:
        holder[key] = _mutated_tensor(value, rng)
    else:
        holder[key] = copy.deepcopy(rng.choice([*VALUES, *TENSORS]))


def _mutated_tensor(x: torch.Tensor, rng: random.Random) -> Any:
    x = x.detach().clone()
    what = rng.randrange(8 if x.is_meta else 9)
    if what < 3 and x.numel():
        entry = rng.choice((math.nan, math.inf, -math.inf, 1e30, -1e20, 0.0, -1.0, 2.0))
        if x.is_floating_point():
            x.view(-1)[rng.randrange(x.numel())] = entry
            return x
        return x.to(torch.int64) - rng.randrange(3)
    if what == 3 and x.numel():  # a flipped bit
        flat = x.contiguous().view(-1)[rng.randrange(x.numel())].view(1).view(torch.uint8)
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
        return x
    if what == 4:
        return x.unsqueeze(0)
    if what == 5:
        return x[..., :-1] if x.dim() else x.expand(2)
    if what == 6:
        return x.to(rng.choice((torch.float16, torch.float64, torch.int64, torch.bool)))
    if what == 7:
        return x.to("meta")
    return x.tolist()


def canonical(state: Any) -> Any:
    """Of plain values only, equal to that of an equal state: NaN equals NaN, 1 is not True or 1.0."""
    if isinstance(state, dict):
        return {key: canonical(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [canonical(value) for value in state]
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), repr(state.tolist())
    return type(state).__name__, repr(state)
