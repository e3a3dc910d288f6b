"""Warnings that name the user's own line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

# Where the calls between a user's line and a warning of ours may pass through.
_BETWEEN = tuple(
    str(Path(module.__file__ or "").parent) + os.sep for module in (sys.modules[__name__], torch)
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line outside of this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_between(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_between(file: str) -> bool:
    return file.startswith(_BETWEEN) or file == contextlib.__file__
