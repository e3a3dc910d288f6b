"""Stage that measures what the planner knows of the device, figure by figure."""

from __future__ import annotations

from bench.core import machine
from bench.device.stage import RESULT, Setting, Stage
from dbp_kernels.tools import calibrate
from dbp_kernels.verify.workers import Case

_LIMIT = 30.0
# what decides most between the planner's candidates
_FIRST = ("product", "narrow", "tensor_cores", "kernels", "sm90", "call", "gbytes", "im2col")


def cases(setting: Setting) -> list[Case]:
    """One for each of ``calibrate.parts``."""
    parts = calibrate.parts(setting.torch_device.type)
    return [Case(name, _LIMIT) for name in sorted(parts, key=lambda name: name not in _FIRST)]


def run(name: str, setting: Setting) -> dict:
    """Some figures, as in a calibration file; "calibration" of the result is such a file in the end."""
    meter = calibrate.Meter(setting.torch_device, quick=setting.rehearse)
    meter.passes = 1  # a GPU that does nothing else has no busy moments
    meter.shortest = min(meter.shortest, 2e-3)  # between events that is enough
    figures = calibrate.part_figures(name, meter)
    content = calibrate.header(
        setting.torch_device,
        "python -m bench device-check",
        machine.commit(),
        machine.dirty(),
    )
    return {RESULT: {"calibration": {**content, "figures": figures}}}


CALIBRATION = Stage("calibration", 20, cases, run)
