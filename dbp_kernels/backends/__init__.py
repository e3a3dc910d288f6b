"""Backends: each implements the opaque ops for the tensors it supports; ``select`` picks one.

On a GPU "auto" takes kernels only after they have passed a check there (``verify``).

A backend is a module with ``patch_gram``, ``patch_mean``, ``decor_stats``, ``fuses_stats``,
``decor_update``, ``gram_update``, ``direct_update`` and ``low_rank_update`` (see
``eager/ops.py``); one with kernels also has ``packing``, a copy to rows of channels. It is
given a `Choice` by whoever calls it, and asks no planner. The module in ``_USABLE`` has
``unusable(device_type) -> str | None``: None, or the reason the backend cannot be used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch

from dbp_kernels.verify import verdict

# "auto" takes the first usable one that is not in _ON_REQUEST.
_MODULES = {
    "cuda": "dbp_kernels.backends.cuda.ops",
    "triton": "dbp_kernels.backends.triton.ops",
    "eager": "dbp_kernels.backends.eager.ops",
}
_ON_REQUEST = {"cuda"}  # on an H100 it was right, and slower than triton: nobody gets it unasked
# Where ``unusable`` is, which must import without what the backend needs.
_USABLE = {
    "cuda": "dbp_kernels.backends.cuda.library",
    "triton": "dbp_kernels.backends.triton.runtime",
    "eager": "dbp_kernels.backends.eager.ops",
}
NAMES = ("auto", *sorted(_MODULES))
_requested: ContextVar[str | None] = ContextVar("dbp_backend", default=None)


def _check(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(map(repr, NAMES))}")
    return name


def requested() -> str:
    """The backend asked for: by ``backend()``, else by DBP_BACKEND, else "auto"."""
    return _requested.get() or _check(os.environ.get("DBP_BACKEND") or "auto", "DBP_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, the opaque ops run on the backend ``name``: "eager", "triton", "cuda" or "auto".

    Raises ValueError for another name; an op raises RuntimeError when the backend is not usable.
    """
    token = _requested.set(_check(name, "name"))
    try:
        yield
    finally:
        _requested.reset(token)


def unusable(name: str, device_type: str) -> str | None:
    """None if the backend works for tensors on this device type, else the reason in one sentence."""
    reason: str | None = _load(_USABLE[name]).unusable(device_type)
    return reason


@lru_cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


def selected(device: torch.device | str) -> str:
    """The name of the backend to run on, for tensors on a device; "cuda" is the current one.

    Raises RuntimeError if the requested backend is not usable.
    """
    device = torch.device(device)
    name = requested()
    if name == "auto":
        return next(n for n in _MODULES if _automatic(n, device))
    reason = unusable(name, device.type)
    if reason:
        raise RuntimeError(f"backend {name!r} was requested, but {reason}")
    return name


def _automatic(name: str, device: torch.device) -> bool:
    # kernels that take CPU tensors do so in an interpreter, for tests: only on request
    if name == "eager":
        return True
    if name in _ON_REQUEST or device.type == "cpu" or unusable(name, device.type):
        return False
    if device.type != "cuda":
        return True
    return verdict.allowed(name, _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def select(device: torch.device | str) -> ModuleType:
    """The backend module to run on. Raises RuntimeError if the requested one is not usable."""
    return module(selected(device))


def module(name: str) -> ModuleType:
    """The backend of this name, as ``selected`` gives it."""
    return _load(_MODULES[name])


def give_up(device: torch.device, reason: str) -> None:
    """From now on "auto" is "eager" on this GPU, in this process; one warning tells why."""
    name = selected(device)
    if name != "eager" and requested() == "auto":
        verdict.withdraw(name, _index(device), reason)
