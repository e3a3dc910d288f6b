"""Stages that time patch_gram on ResNet layers: ours as the planner chooses, and each kernel family.

A case "dbp: layer" has the library's choice beside all rivals, "triton: layer" that family's kernels
beside unfold + matmul; they become one record. Times are those of calls and of replayed graphs.
"""

from __future__ import annotations

from dataclasses import replace

from bench.core import machine, registry
from bench.core.bars import GPU_BATCHES
from bench.device.methods import kernel_method
from bench.device.stage import DTYPE, RESULT, SKIPPED, Setting, Stage
from bench.rivals import RIVALS
from bench.suites import kernels
from dbp_kernels.verify.workers import Case

_LIMIT, _PAIRS = 25.0, 9
_PEAKS = "peaks"
_MAIN = ("3x3 64@56 b26", "7x7 s2 3@224 b26", "1x1 256@56 b26", "3x3 256@14 b256")
_REHEARSED = (registry.conv(2, 4, 6, 3, tags=("resnet18",)), registry.conv(2, 8, 5, 1))


def _key(case: registry.Case) -> tuple:
    """3x3 of stride 1 first, which is what the package is for; the sampled batch before the whole."""
    strided = case.stride != (1, 1)
    return (case.kernel != (3, 3) or strided, strided and case.kernel != (7, 7), case.N)


def all_layers(setting: Setting) -> list[registry.Case]:
    """Of the ResNets, at both batches."""
    if setting.rehearse:
        return list(_REHEARSED)
    return sorted((c for n in GPU_BATCHES for c in registry.select(registry.RESNETS, n)), key=_key)


def _cases(layers: list[registry.Case], setting: Setting) -> list[Case]:
    methods = (kernels.OURS, *setting.families())
    cases = [Case(f"{method}: {layer.name}", _LIMIT) for layer in layers for method in methods]
    return [Case(_PEAKS, _LIMIT), *cases]


def main_cases(setting: Setting) -> list[Case]:
    """One layer for each main kernel."""
    layers = all_layers(setting)
    return _cases([c for c in layers if setting.rehearse or c.name in _MAIN], setting)


def all_cases(setting: Setting) -> list[Case]:
    return _cases(all_layers(setting), setting)


def run(name: str, setting: Setting) -> dict:
    """One method on one layer."""
    device = setting.torch_device
    if name == _PEAKS:
        return {RESULT: {"peaks": machine.peaks(device, DTYPE)}}
    method, _, layer = name.partition(": ")
    case = next(c for c in all_layers(setting) if c.name == layer)
    settings = kernels.Settings(device, DTYPE, _PAIRS, channels_last=True, replay=True)
    if setting.rehearse:
        settings = replace(settings, pairs=1, warmup=1)
    methods = kernels.default_methods(device)
    methods.pop("compiled", None)  # compiling for every layer takes longer than all else
    if method != kernels.OURS:
        methods = {
            method: kernel_method(method, device, DTYPE),
            kernels.PLAIN: RIVALS[kernels.PLAIN],
        }
    record = kernels.run_case(case, settings, methods)
    found = record["methods"][method]
    if method != kernels.OURS:
        times = record["methods"][kernels.PLAIN]
        record.update(methods={}, backends={method: {**found, "unfold": times}})
    what = {"kernel": method, "dtype": "bf16", "geometry": layer}
    return {**what, **judged(found), **_told(found), RESULT: {"kernels": [record]}}


def judged(found: dict) -> dict:
    """The case's status by its method's record."""
    status = found["status"]
    if status == "failed":
        memory = "out of memory" in found["reason"].lower()
        return {"status": "out of memory" if memory else "raised", "reason": found["reason"]}
    if status == "ok":
        return {"status": "passed"}
    return {"status": SKIPPED if status == "n/a" else "failed", "reason": found["reason"]}


def _told(found: dict) -> dict:
    """Error and milliseconds, for the case's line."""
    told = {"error": found["error"]} if "error" in found else {}
    for key, label in (("seconds", "ms_as_called"), ("replay", "ms_replayed")):
        if key in found:
            told[label] = float(f"{1e3 * found[key]['median']:.4g}")
    return told


TIMES = Stage("times", 30, main_cases, run)
LAYERS = Stage("layers", 90, all_cases, run)
