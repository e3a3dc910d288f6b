"""The environment report: versions, devices, what was built, which backends are usable and why not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from dbp_kernels import backends
from dbp_kernels.backends.cuda import library
from dbp_kernels.planning.calibration import calibration
from dbp_kernels.verify import verdict
from dbp_kernels.version import __version__


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [
        f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices.append(
                f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            )
    return devices


def _calibration(device_type: str) -> str:
    try:
        return calibration(device_type).text
    except ValueError as error:  # of DBP_CALIBRATION's file: what the report is there to tell
        return str(error)


def _usable(name: str, device: str) -> str:
    """ "usable" and what is known of a check on this GPU, or why not."""
    reason = backends.unusable(name, device)
    if reason or device != "cuda" or name == "eager":
        return reason or "usable"
    found = verdict.known(name, torch.cuda.current_device())
    return f"usable, {found.text if found else 'not verified on this GPU yet'}"


def environment() -> dict[str, Any]:
    """What a bug report should say, as plain data: versions, devices, compiled parts, backends.

    ``backends`` maps a name to "usable" (on a GPU: and whether its kernels have passed their check
    there) or the reason it is not, for every device type present;
    "calibrations" tells for each where the planner's figures come from.
    """
    built = library.build_text()
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "dbp-kernels": __version__,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "compiled parts": f"cuda kernels, {built}" if built else "none (pure Python)",
        "calibrations": {device: _calibration(device) for device in types},
        "backend requested": backends.requested(),
        "backends": {
            device: {name: _usable(name, device) for name in backends.NAMES if name != "auto"}
            for device in types
        },
    }


def report() -> str:
    """``environment()`` as text."""
    lines = []
    for key, value in environment().items():
        if key == "devices":
            lines += [f"{'device':18}{device}" for device in value]
        elif key == "calibrations":
            lines += [f"{f'planner on {device}':18}{text}" for device, text in value.items()]
        elif key == "backends":
            for device, usable in value.items():
                lines += [f"{f'{name} on {device}':18}{why}" for name, why in usable.items()]
        else:
            lines.append(f"{key:18}{value if value is not None else 'not installed'}")
    return "\n".join(lines)
