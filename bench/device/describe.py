"""The machine and its kernels, by a worker: the parent of all workers never touches the GPU."""

from __future__ import annotations

from bench.device.correctness import kernel_of
from bench.device.stage import RESULT, Setting, Stage
from dbp_kernels.verify.workers import Case

MACHINE, FAMILIES, CHECKS = "machine", "families", "names of the checks"
FOUND = "found"  # what a case adds to ``Setting.machine``


def cases(setting: Setting) -> list[Case]:
    return [Case(name, 60.0) for name in (MACHINE, FAMILIES, CHECKS)]


def run(name: str, setting: Setting) -> dict:
    """Versions and device for the result file; for later stages what is under FOUND.

    That is "families" {name: "" or why it cannot run here}, "capability", "checks" {scope: the names
    of the kernels' checks} and "tiny" {family: one check of each of its kernels}.
    """
    return {MACHINE: _machine, FAMILIES: _families, CHECKS: _checks}[name](setting)


def _machine(setting: Setting) -> dict:
    import torch

    if setting.device != "cpu" and not torch.cuda.is_available():
        return {"status": "failed", "no_device": True, "reason": "no CUDA device is available"}
    import dbp_kernels
    from bench.core import machine
    from dbp_kernels import info

    package = {"version": dbp_kernels.__version__, "path": dbp_kernels.__file__}
    described = machine.describe(setting.torch_device)
    return {
        RESULT: {"machine": described, "package": package, "environment": info.environment()},
        "free_bytes": _free_bytes(setting),
    }


def _free_bytes(setting: Setting) -> int | None:
    """Of the GPU's memory: others may be using it."""
    import torch

    return torch.cuda.mem_get_info(setting.torch_device)[0] if setting.device != "cpu" else None


def _families(setting: Setting) -> dict:
    from dbp_kernels.backends import unusable
    from dbp_kernels.backends.cuda import library

    families = {f: unusable(f, setting.torch_device.type) or "" for f in ("triton", "cuda")}
    families["cuda_sm90"] = families["cuda"] or library.sm90_problem() or ""
    return {FOUND: {"families": families, "capability": _capability(setting)}}


def _capability(setting: Setting) -> int:
    import torch

    if setting.device == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(setting.torch_device)
    return 10 * major + minor


def _checks(setting: Setting) -> dict:
    from dbp_kernels.verify import cases as checks

    capability = checks.capability_of(setting.torch_device)
    usable = [f for f, why in checks.available(setting.torch_device.type).items() if not why]
    names = {scope: checks.names(usable, scope, capability) for scope in checks.SCOPES}
    first: dict[str, str] = {}
    for name in names["all"]:
        first.setdefault(kernel_of(name), name)
    tiny = {f: [n for k, n in first.items() if k.startswith(f"{f} ")] for f in usable}
    return {FOUND: {"checks": names, "tiny": tiny}}


DESCRIBE = Stage("describe", 150.0, cases, run, bare=True, family=lambda name: name)
