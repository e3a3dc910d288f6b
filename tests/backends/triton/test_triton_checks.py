"""The checks of the Triton kernels, interpreted: all pass, and every configuration is there."""

import pytest
import torch
from helpers import DEVICE

from dbp_kernels.backends.triton import configs, runtime
from dbp_kernels.verify import cases, checks, triton_checks

TARGET = runtime.target(DEVICE) if DEVICE.type == "cuda" else 90
PLANNED = list(triton_checks.checks("planned", TARGET))


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.precision in slow else [])
        for slow in [("tf32", "fp16")]
        for c in PLANNED
    ],
)
def test_every_check_passes(check):
    record = checks.run(check, DEVICE)
    assert record["status"] == "passed", record
    assert record["error"] <= record["bound"]


@pytest.mark.parametrize("target", runtime.TARGETS)
def test_every_configuration_a_planner_can_choose_is_checked(target):
    planned = triton_checks.checks("planned", target)
    found = {(c.kernel, c.precision, c.configuration) for c in planned}
    everything = triton_checks.checks("all", target)
    beyond = {(c.kernel, c.precision, c.configuration) for c in everything}
    assert found < beyond
    for kernel, by_precision in configs._family(target).items():
        for precision, shipped in by_precision.items():
            wanted = {(kernel, precision, config.text) for config in shipped}
            if kernel != "gram_shift_tma":  # chosen only where it was measured to be faster
                assert wanted <= found
            elif target >= 90:
                assert wanted <= beyond


def test_tensor_descriptors_are_checked_where_they_were_measured(monkeypatch):
    """There the planner may choose them: "planned" must not leave them out."""
    row = {"sizes": {"pixels": 9}, "config": {}, "seconds": {"x": 1.0}}
    pins = {"gram_shift_tma": {"bf16": [row]}}
    table = {"device": "Make-believe 9000", "capability": 90, "pinned": pins}
    shipped = configs._files()
    monkeypatch.setattr(configs, "_files", lambda: (*shipped, table))

    def kernels(target):
        return {c.kernel for c in triton_checks.checks("planned", target)}

    assert "gram_shift_tma" in kernels(90)
    assert "gram_shift_tma" not in kernels(100)  # a device's pins serve its own capability only
    table["pinned"] = {"gram_shift_tma": {"bf16": []}}
    assert "gram_shift_tma" not in kernels(90)


@pytest.mark.parametrize("target", runtime.TARGETS)
@pytest.mark.parametrize("scope", cases.SCOPES)
def test_names_are_unique_single_lines(scope, target):
    names = cases.names(["triton"], scope, target)
    assert len(set(names)) == len(names)
    assert not any("\n" in name for name in names)


def test_a_check_is_run_by_its_name():
    name = next(c.name for c in PLANNED if c.kernel == "symmetric_update")
    record = cases.run(name, DEVICE)
    assert record["status"] == "passed"
    assert (record["family"], record["kernel"]) == ("triton", "symmetric_update")
    with pytest.raises(KeyError, match="no such check"):
        cases.run("no such check", torch.device(DEVICE))
