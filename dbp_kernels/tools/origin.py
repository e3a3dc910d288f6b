"""Where the code that measures comes from: a clone, at which commit, or an installed package."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def clone() -> Path | None:
    """The clone that the package is run from; None for an installed package."""
    root = PACKAGE.parent
    return root if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file() else None


def commit(root: Path | None) -> str | None:
    """The commit of a clone; None where git does not say."""
    return _git(root, "rev-parse", "HEAD")


def dirty(root: Path | None) -> bool | None:
    """Whether the code that is measured, or measures, differs from the commit."""
    folders = ("dbp_kernels", "csrc", "bench", "experiments", ":!bench/results")
    status = _git(root, "status", "--porcelain", "--", *folders)
    return None if status is None else bool(status)


def _git(root: Path | None, *arguments: str) -> str | None:
    if root is None:
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def slug(name: str) -> str:
    """A device's name as part of a file's, e.g. nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
