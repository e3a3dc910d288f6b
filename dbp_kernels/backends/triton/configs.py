"""Tile shapes per GPU, from the JSON files in ``configs/``.

``sm80.json`` and the like hold the configurations shipped for a family of GPUs, for each kernel and
precision, largest tile first: exactly these are compiled in tests. A file named after a GPU holds
what ``python -m dbp_kernels tune`` found fastest on it, by problem size ("pinned"). A GPU without such a
file takes that of another GPU of its compute capability, or else the kernel's own rule of thumb.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from dbp_kernels.backends.triton import runtime

# A pinned configuration serves problems whose sizes differ from its own by this factor in all.
_NEAR = 4


@dataclass(frozen=True)
class Config:
    """One program's tile (rows, columns, inner) and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def text(self) -> str:
        """E.g. "128x64x32 w4 s3"."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} w{self.num_warps} s{self.num_stages}"


def precision_key(dtype: torch.dtype) -> str:
    """ "bf16", "fp16", and "tf32" or "ieee" for float32, as its matmul precision says."""
    return runtime.dot_precision(dtype) if dtype == torch.float32 else runtime.element(dtype)


def configs(kernel: str, precision: str, target: int) -> tuple[Config, ...]:
    """All shipped configurations, largest tile first. Raises KeyError for an unknown kernel."""
    return _family(target)[kernel][precision]


def pinned(
    kernel: str, precision: str, sizes: dict[str, int], device: torch.device
) -> Config | None:
    """The measured best for a problem of these sizes on this GPU; None: nothing was measured."""
    entry = _measured(kernel, precision, sizes, device)
    return Config(**entry["config"]) if entry else None


def seconds(
    kernel: str, precision: str, sizes: dict[str, int], device: torch.device
) -> float | None:
    """What the best took when it was measured; None: nothing was measured."""
    entry = _measured(kernel, precision, sizes, device)
    return min(entry["seconds"].values()) if entry else None


def measured(kernel: str, target: int) -> bool:
    """Whether anything is pinned for a kernel on a GPU of this compute capability."""
    tables = [e for e in _files() if e.get("device") and e["capability"] == target]
    return any(any(table["pinned"].get(kernel, {}).values()) for table in tables)


def _measured(
    kernel: str, precision: str, sizes: dict[str, int], device: torch.device
) -> dict[str, Any] | None:
    if runtime.on_cpu():
        return None
    name = torch.cuda.get_device_name(device)
    return _nearest(kernel, precision, tuple(sorted(sizes.items())), name, runtime.target(device))


@lru_cache(maxsize=1024)
def _nearest(
    kernel: str, precision: str, sizes: tuple[tuple[str, int], ...], name: str, target: int
) -> dict[str, Any] | None:
    tables = {entry["device"]: entry for entry in _files() if entry.get("device")}
    alike = [entry for entry in tables.values() if entry["capability"] == target]
    table = tables.get(name) or (alike[0] if alike else None)
    if table is None:
        return None
    best, least = None, math.log2(_NEAR)
    for entry in table["pinned"].get(kernel, {}).get(precision, ()):
        if entry["sizes"].keys() == dict(sizes).keys():
            distance = sum(abs(math.log2(max(1, n) / max(1, entry["sizes"][k]))) for k, n in sizes)
            if distance <= least:
                best, least = entry, distance
    return best


@lru_cache
def _family(target: int) -> dict[str, dict[str, tuple[Config, ...]]]:
    """The newest family not newer than the target whose shared memory is not larger."""
    families = {entry["capability"]: entry for entry in _files() if not entry.get("device")}
    limit = runtime.shared_limit(target)
    fit = [c for c in families if c <= target and runtime.shared_limit(c) <= limit]
    table = families[max(fit, default=min(families))]["configs"]
    return {
        kernel: {key: tuple(Config(*row) for row in rows) for key, rows in by_precision.items()}
        for kernel, by_precision in table.items()
    }


@lru_cache
def _files() -> tuple[dict[str, Any], ...]:
    folder = files(__package__).joinpath("configs")
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return tuple(json.loads(path.read_text()) for path in paths)
