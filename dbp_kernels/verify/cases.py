"""All checks of all kernels, by name: what a process that may die is asked to run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from dbp_kernels.backends import unusable
from dbp_kernels.verify.checks import Check
from dbp_kernels.verify.checks import run as run_check

FAMILIES = ("triton", "cuda")
SCOPES = ("planned", "all")


def available(device_type: str) -> dict[str, str]:
    """{family: "" or why its kernels cannot run on this type of device}."""
    return {family: unusable(family, device_type) or "" for family in FAMILIES}


def names(families: Sequence[str], scope: str, capability: int) -> list[str]:
    """The checks' names, the most telling first.

    Args:
        families: of FAMILIES; each must be installed.
        scope: "planned", what the planner can choose on a device of this capability, or "all" that
            ships for it, and larger problems.
        capability: e.g. 90.

    Raises ValueError for another scope.
    """
    return [check.name for f in families for check in checks(f, scope, capability)]


def run(name: str, device: torch.device) -> dict[str, Any]:
    """Runs one of "all" checks on a device; see ``checks.run``. Raises KeyError for another name."""
    return run_check(_by_name(capability_of(device))[name], device)


def capability_of(device: torch.device) -> int:
    """E.g. 90; that of the kernels that run on CPU tensors for a CPU."""
    if device.type != "cuda":
        from dbp_kernels.backends.triton import runtime

        return runtime.target(device)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def checks(family: str, scope: str, capability: int) -> list[Check]:
    """A family's checks; arguments and errors as of ``names``."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(map(repr, SCOPES))}")
    # only now: a family's kernels may need what is not installed
    module = importlib.import_module(f".{family}_checks", __package__)
    return list(module.checks(scope, capability))


@lru_cache
def _by_name(capability: int) -> dict[str, Check]:
    found = available("cuda" if torch.cuda.is_available() else "cpu")
    usable = [family for family, why in found.items() if not why]
    return {check.name: check for f in usable for check in checks(f, "all", capability)}
