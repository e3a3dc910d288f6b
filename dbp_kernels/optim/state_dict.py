"""Checks a DecorUpdate's state_dict before any of it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbp_kernels.optim.options import checked_options


def checked_generator(
    state_dict: Any, sizes: list[int], defaults: dict[str, Any]
) -> torch.Generator:
    """The saved random generator, if all else can be loaded too (but the budget, not looked at).

    Args:
        state_dict: what was given as DecorUpdate.state_dict().
        sizes: layers in each group of the DecorUpdate that loads it.
        defaults: the options that every group has.

    Raises ValueError saying what is wrong with it.
    """

    def check(valid: bool, what: str) -> None:
        if not valid:
            raise ValueError(f"state_dict {what}; expected one of DecorUpdate.state_dict()")

    check(isinstance(state_dict, dict), f"is a {type(state_dict).__name__}")
    missing = {"state", "param_groups", "steps", "generator"} - set(state_dict)
    check(not missing, f"has no {sorted(missing)}")
    steps, groups, entries = (state_dict[key] for key in ("steps", "param_groups", "state"))
    check(isinstance(steps, int) and steps >= 0, f"has steps={steps!r}")
    check(isinstance(groups, list), "has no list of param_groups")
    check(isinstance(entries, dict), f"has state={entries!r}")
    for group in groups:
        # torch's load_state_dict adds one of its own to the defaults; "clip" came later than others
        missing = {"params", *defaults} - {"differentiable", "clip"} - set(group)
        check(not missing, f"has a group without {sorted(missing)}")
        checked_options({key: group[key] for key in defaults if key in group})
    saved = [len(group["params"]) for group in groups]
    check(saved == sizes, f"has groups of {saved} layers, this DecorUpdate has {sizes}")
    for index, entry in entries.items():
        # before there was a clip, nothing was clipped
        valid = isinstance(entry, dict) and entry.keys() - {"clipped"} == {"loss", "skipped"}
        valid = valid and all(isinstance(v, Tensor) and v.dim() == 0 for v in entry.values())
        check(valid, f"has state[{index!r}]={entry!r} without scalars 'loss' and 'skipped'")
    check(valid_phases(state_dict.get("phases"), sum(sizes)), "has phases of other layers")
    generator = torch.Generator()
    try:
        generator.set_state(state_dict["generator"].cpu())
    except (AttributeError, RuntimeError, TypeError) as error:
        check(False, f"has no valid state of a CPU generator ({error})")
    return generator


def valid_phases(phases: Any, layers: int) -> bool:
    """Whether they are None, or a number for each layer."""
    return phases is None or (
        isinstance(phases, list) and len(phases) == layers and all(type(p) is int for p in phases)
    )
