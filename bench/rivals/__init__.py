"""What patch_gram is compared with: other ways to the same S, each as its own user would write it.

Every rival is a function (input, case) -> S of shape (groups, D, D), the mean over all patches of
z z^T with z ordered (channel, tap); half-precision inputs give a float32 S, though a library may
have rounded its sums (the weight gradient is).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.core.registry import Case
from bench.rivals import dense, padded, self_wgrad


@dataclass(frozen=True)
class Rival:
    """A named way to S.

    Attributes:
        label: for tables.
        compute: (input, case) -> S.
        why_not: case -> a sentence why the rival does not apply, or "". What only the input tells
            ``compute`` says, by raising NotApplicable.
        ours: one of our own kernels, held to their bound.
    """

    label: str
    compute: Callable[[Tensor, Case], Tensor]
    why_not: Callable[[Case], str]
    ours: bool = False


class NotApplicable(Exception):
    """A method is not for this input; says why."""


RIVALS: dict[str, Rival] = {
    "unfold": Rival("unfold + matmul", dense.unfold_matmul, lambda case: ""),
    "self_wgrad": Rival(
        "self weight gradient + borders", self_wgrad.self_wgrad, self_wgrad.why_not
    ),
}
# Written for GPUs: many products with little work each, or many more operations.
GPU_RIVALS: dict[str, Rival] = {
    "padded_gemm": Rival("GEMMs on a padded buffer", padded.padded_gemm, padded.why_not),
    "bmm": Rival("unfold + bmm", dense.batched_matmul, dense.batched_why_not),
}
COMPILED = Rival("torch.compile of the definition", dense.compiled_reference, lambda case: "")
# {package: its rival}, used where it is installed
OPTIONAL: dict[str, Rival] = {
    "einconv": Rival("einconv KFC", dense.einconv_kfc, dense.einconv_why_not),
}
GPU_OPTIONAL: dict[str, Rival] = {
    "quack": Rival("unfold + quack", dense.quack_symmetric, dense.quack_why_not),
}


def rivals_on(device: torch.device) -> dict[str, Rival]:
    """What patch_gram is compared with on a device."""
    found = {**RIVALS}
    optional = {**OPTIONAL}
    if device.type == "cuda":
        found.update(GPU_RIVALS, compiled=COMPILED)
        optional.update(GPU_OPTIONAL)
    return found | {name: rival for name, rival in optional.items() if installed(name)}


def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return find_spec(package) is not None
