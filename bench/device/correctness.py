"""Stages of the kernels' own checks: small problems against the float64 definitions."""

from __future__ import annotations

from bench.device.stage import Setting, Stage
from dbp_kernels.verify.workers import Case

_LIMIT = 20.0  # seconds, compilation included
_REHEARSED = 4  # checks: the interpreter takes its time
# a wrong address is reported by the launch that it belongs to
_ENV = {"CUDA_LAUNCH_BLOCKING": "1"}


def kernel_of(name: str) -> str:
    """Family and kernel of a check called "family kernel [configuration] dtype: geometry"."""
    return " ".join(name.split()[:2])


def _names(setting: Setting, scope: str) -> list[str]:
    """Of all kernels in turn, each one's most telling first; raises KeyError if they are not known."""
    by_kernel: dict[str, list[str]] = {}
    for name in setting.machine["checks"][scope]:
        by_kernel.setdefault(kernel_of(name), []).append(name)
    most = max(map(len, by_kernel.values()), default=0)
    return [names[n] for n in range(most) for names in by_kernel.values() if n < len(names)]


def planned(setting: Setting) -> list[Case]:
    """What the planner can choose on this device."""
    names = _names(setting, "planned")
    return [Case(name, _LIMIT) for name in (names[:_REHEARSED] if setting.rehearse else names)]


def others(setting: Setting) -> list[Case]:
    """Everything else that ships, and larger problems."""
    before = set(setting.machine["checks"]["planned"])
    names = [name for name in _names(setting, "all") if name not in before]
    return [Case(name, _LIMIT) for name in (names[:_REHEARSED] if setting.rehearse else names)]


def run(name: str, setting: Setting) -> dict:
    """A check's record: kernel, configuration, dtype, geometry, error, bound."""
    from dbp_kernels.verify import cases

    return cases.run(name, setting.torch_device)


CHECKS = Stage("checks", 50, planned, run, workers=8, env=_ENV, family=kernel_of)
CONFIGURATIONS = Stage("configurations", 150, others, run, workers=8, env=_ENV, family=kernel_of)
