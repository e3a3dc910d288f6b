"""Cases that go wrong on purpose, for rehearsals: among those of every stage, each in its own way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from bench.core import registry
from bench.device.stage import Setting
from bench.rivals import Rival
from bench.suites import kernels
from dbp_kernels.verify.workers import Case

_FAULT = "fault "
_HANG_LIMIT, _PATIENCE = 1.0, 3  # seconds; a factor on limits


def is_one(name: str) -> bool:
    return name.startswith(_FAULT)


def among(cases: Sequence[Case]) -> list[Case]:
    """The cases with one of each fault behind the first of them; interpreted kernels take longer."""
    slow = [Case(case.name, _PATIENCE * case.limit) for case in cases]
    return [*slow[:1], *(Case(name, LIMITS.get(name, 30.0)) for name in FAULTS), *slow[1:]]


def run(name: str, setting: Setting) -> dict:
    """Goes wrong."""
    return FAULTS[name](setting)


def _abort(setting: Setting) -> dict:
    os.abort()


def _hang(setting: Setting) -> dict:
    while True:
        time.sleep(60)


def _raise(setting: Setting) -> dict:
    raise ValueError("on purpose")


def _out_of_memory(setting: Setting) -> dict:
    torch.empty(2**50, device=setting.device)
    return {}


def _nan(setting: Setting) -> dict:
    """A kernel whose result is NaN, judged as all kernels are."""
    case = registry.conv(2, 3, 5, 3)
    settings = kernels.Settings(device=setting.torch_device, pairs=1)
    wrong = Rival("NaN", lambda x, case: x.new_full((1, case.D, case.D), torch.nan), lambda c: "")
    record = kernels.run_case(case, settings, {kernels.OURS: wrong})
    judged = record["methods"][kernels.OURS]
    return {"status": "failed" if judged["status"] == "wrong" else "passed", **_reason(judged)}


def _reason(judged: dict) -> dict:
    return {"reason": judged["reason"]} if "reason" in judged else {}


# {name: what it does}, and what is to be recorded of each
FAULTS: dict[str, Callable[[Setting], dict]] = {
    "fault abort": _abort,
    "fault hang": _hang,
    "fault NaN": _nan,
    "fault raise": _raise,
    "fault memory": _out_of_memory,
}
EXPECTED = {
    "fault abort": "crashed",
    "fault hang": "hung",
    "fault NaN": "failed",
    "fault raise": "raised",
    "fault memory": "out of memory",
}
LIMITS = {"fault hang": _HANG_LIMIT}
