"""Backends: each implements the opaque ops for the tensors it supports; ``select`` picks one.

A backend is a module with ``patch_gram``, ``patch_mean``, ``decor_stats`` and ``decor_update`` (see
``eager/ops.py``) and ``unusable(device_type) -> str | None``: None, or the reason it cannot be used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

# Fastest first; "auto" takes the first usable one. A planned backend joins by adding its line.
_MODULES = {
    "cuda": None,
    "triton": None,
    "eager": "dbp_kernels.backends.eager.ops",
}
NAMES = ("auto", *sorted(_MODULES))
_requested: ContextVar[str | None] = ContextVar("dbp_backend", default=None)


def _check(name: str, source: str) -> str:
    if name not in NAMES:
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
    if _MODULES[name] is None:
        return f"the {name} backend is not part of this version"
    return _load(name).unusable(device_type)


@lru_cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def select(device_type: str) -> ModuleType:
    """The backend module to run on. Raises RuntimeError if the requested one is not usable."""
    name = requested()
    if name != "auto":
        reason = unusable(name, device_type)
        if reason:
            raise RuntimeError(f"backend {name!r} was requested, but {reason}")
        return _load(name)
    return next(_load(n) for n in _MODULES if unusable(n, device_type) is None)
