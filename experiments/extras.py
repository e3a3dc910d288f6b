"""The optional packages of the experiments, imported only where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, package: str, purpose: str, extra: str = "experiments") -> ModuleType:
    """Imports ``module``, or raises ImportError with one sentence saying what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: "
            f"pip install 'dbp-kernels[{extra}]' (or pip install {package})"
        ) from error
