"""Checks of what a DecorUpdate or attach has saved, before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.loaded import StateError, is_int, why_no_tensor
from dbp_kernels.optim.guard import CLIPPED, SKIPPED
from dbp_kernels.optim.options import checked_options


def checked_generator(
    state_dict: Any, names: Sequence[Sequence[str]], defaults: dict[str, Any]
) -> torch.Generator:
    """The saved random generator, if all else can be loaded too (but the budget, not looked at).

    Args:
        state_dict: what was given as DecorUpdate.state_dict().
        names: the layers in each group of the DecorUpdate that loads it.
        defaults: the options that every group has.

    Raises ValueError saying what is wrong with it.
    """

    def check(valid: bool, what: str) -> None:
        if not valid:
            raise StateError(f"state_dict {what}; expected one of DecorUpdate.state_dict()")

    check(isinstance(state_dict, dict), f"is a {type(state_dict).__name__}")
    missing = {"state", "param_groups", "steps", "generator"} - set(state_dict)
    check(not missing, f"has no {sorted(missing)}")
    steps, groups, entries = (state_dict[key] for key in ("steps", "param_groups", "state"))
    check(is_int(steps), f"has steps={steps!r}")
    valid = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    check(valid, "has no list of param_groups")
    check(isinstance(entries, dict), f"has state={entries!r}")
    for group in groups:
        # torch's load_state_dict adds one of its own to the defaults; "clip" came later than others
        missing = {"params", *defaults} - {"differentiable", "clip"} - set(group)
        check(not missing, f"has a group without {sorted(missing)}")
        checked_options({key: group[key] for key in (*defaults, "initial_lr") if key in group})
        check(isinstance(group["params"], list), f"has params={group['params']!r}")
    layers = [layer for group in groups for layer in group["params"]]
    check(all(map(is_int, layers)) and layers == sorted(set(layers)), f"has params={layers!r}")
    saved, sizes = [len(group["params"]) for group in groups], list(map(len, names))
    check(saved == sizes, f"has groups of {saved} layers, this DecorUpdate has {sizes}")
    for group, own in zip(groups, names):
        told = group.get("param_names", own)
        valid = isinstance(told, list) and len(told) == len(own)
        check(valid, f"has param_names={told!r}")
        for name, here in zip(told, own):
            check(
                _same_layer(name, here), f"has layer {name!r} of another model in {here!r}'s place"
            )
    for index, entry in entries.items():
        valid = is_int(index) and index in layers and isinstance(entry, dict)
        valid = valid and entry.keys() <= {"loss", SKIPPED, CLIPPED}
        check(valid, f"has state[{index!r}]={entry!r}")
        reason = why_no_report(entry)
        check(reason is None, f"has state[{index!r}] whose {reason}")
    check(valid_phases(state_dict.get("phases"), len(layers)), "has phases of other layers")
    generator = generator_of(state_dict["generator"])
    if isinstance(generator, str):
        raise StateError(f"state_dict has {generator}")
    return generator


def _same_layer(saved: Any, own: str) -> bool:
    """Whether the names agree, up to what the model is part of."""
    if not isinstance(saved, str):
        return False
    return f".{saved}".endswith(f".{own}") or f".{own}".endswith(f".{saved}")


def why_no_report(entry: Mapping[str, Any]) -> str | None:
    """Why an entry has not a layer's "loss", "skipped" and "clipped", in words; None if it has."""
    loss = entry.get("loss")
    reason = why_no_tensor(loss, ())
    if reason is None and isinstance(loss, Tensor) and loss.is_meta:
        reason = "is on meta: expected a value"
    if reason is not None:
        return f"loss {reason}"
    for kind in (SKIPPED, CLIPPED):
        if kind == CLIPPED and kind not in entry:
            continue  # before there was a clip, nothing was clipped
        count = entry.get(kind)
        if not _is_count(count):
            return f"{kind}={count!r}: expected a 0-dimensional integer tensor of at least 0"
    return None


def _is_count(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() or x.is_meta or x.layout != torch.strided:
        return False
    if x.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        return False
    return int(x) >= 0


def generator_of(state: Any) -> torch.Generator | str:
    """A CPU generator in a saved state, or what is wrong with that, in words."""
    generator = torch.Generator()
    try:
        generator.set_state(state.cpu())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"no valid state of a CPU generator ({error})"
    return generator


def valid_phases(phases: Any, layers: int) -> bool:
    """Whether they are None, or a number for each layer."""
    return phases is None or (
        isinstance(phases, list) and len(phases) == layers and all(map(is_int, phases))
    )
