"""Stage that times the kernels on D x D: the update from S, and the fused statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.device.stage import RESULT, Setting, Stage
from dbp_kernels.precision import products_in
from dbp_kernels.rules import Update
from dbp_kernels.tools.cases import error
from dbp_kernels.tools.timing import time_interleaved, time_replayed
from dbp_kernels.verify.workers import Case

_LIMIT, _PAIRS = 20.0, 9
_SIZES, _REHEARSED = (576, 2304), (24,)
_RIVAL = "eager"  # the libraries' products and pointwise operations


def cases(setting: Setting) -> list[Case]:
    """Sizes for each backend with kernels."""
    families = [f for f in setting.families() if f != "cuda_sm90"]
    updates = [f"update {dim}" for dim in (_REHEARSED if setting.rehearse else _SIZES)]
    return [Case(f"{f}: {what}", _LIMIT) for what in (*updates, "statistics") for f in families]


def _update(dim: int, device: torch.device) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """(one update of R from S, the same in float64)."""
    import dbp_kernels as dbp
    from dbp_kernels import backends

    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(1, 2 * dim, dim, generator=generator).to(device)
    S, R = Z.mT @ Z / Z.shape[1], torch.eye(dim, device=device)[None]
    rule = dbp.rules.UpdateRule.make("standard", 0.5, dim)
    return (
        lambda: _result(backends.select(device.type).gram_update(S, R, rule), R),
        lambda: dbp.rules.update_from_gram(S.double(), R.double(), 0.01, 0.5),
    )


def _result(update: Update, R: Tensor) -> tuple[Tensor, Tensor]:
    return update.new(R, 0.01), update.loss


def _statistics(device: torch.device, rehearse: bool) -> tuple[Callable, Callable]:
    """(C and V of a 3x3 layer of 3 channels, the same in float64)."""
    from dbp_kernels import reference

    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 9, 9) if rehearse else (128, 3, 32, 32)
    x = torch.randn(shape, generator=generator).to(device)
    R = torch.eye(27, device=device)[None]
    window = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    return (
        lambda: torch.ops.dbp.decor_stats(x, R, *window),
        lambda: reference.decor_stats(x.double(), R.double(), *window),
    )


def run(name: str, setting: Setting) -> dict:
    """The backend's time beside that of the libraries, on the same input."""
    import dbp_kernels as dbp

    family, _, what = name.partition(": ")
    device, pairs = setting.torch_device, 1 if setting.rehearse else _PAIRS
    precision = "ieee" if what == "statistics" else "tf32x3"  # as DecorUpdate does by default
    if what == "statistics":
        call, exact = _statistics(device, setting.rehearse)
    else:
        call, exact = _update(int(what.split()[1]), device)

    def by(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def within():
            with dbp.backend(backend), products_in(precision):
                return call()

        return within

    calls = {family: by(family), _RIVAL: by(_RIVAL)}
    oracle = exact()
    errors = {
        key: max(error(a.reshape(b.shape), b) for a, b in zip(compute(), oracle))
        for key, compute in calls.items()
    }
    bound = 2 * errors[_RIVAL] + 1e-5
    found = {
        "kernel": f"{family} {what}",
        "dtype": precision,
        "error": errors[family],
        "bound": bound,
    }
    if not errors[family] <= bound:
        return {
            "status": "failed",
            "reason": f"error {errors[family]:.2e} above {bound:.2e}",
            **found,
        }
    seconds = time_interleaved(calls, pairs, device=device)
    replays, reasons = time_replayed(calls, pairs, device=device)
    methods = {
        key: {
            "status": "ok",
            "error": errors[key],
            "seconds": seconds[key].as_dict(),
            **({"replay": replays[key].as_dict()} if key in replays else {}),
            **({"no_replay": reasons[key]} if key in reasons else {}),
        }
        for key in calls
    }
    return {**found, RESULT: {"matrices": [{"name": what, "methods": methods}]}}


TIMES = Stage("matrices", 15, cases, run)
