"""The stages: their table, their cases, and what a family that keeps crashing may take."""

import math
import time

import pytest

import dbp_kernels as dbp
from bench import cli
from bench.core import bars, machine, registry
from bench.core.networks import StepCase
from bench.device import (
    command,
    correctness,
    groups,
    layers,
    runner,
    sanitizer,
    steps,
    suite,
    tuning,
)
from bench.device.stage import Setting, Stage
from dbp_kernels import backends, precision
from dbp_kernels.tools import calibrate
from dbp_kernels.verify.workers import Case

NAMES = {
    "planned": ["triton a [1] bf16: x", "triton a [2] bf16: x", "cuda b [1] bf16: x"],
    "all": ["triton a [1] bf16: x", "triton c [9] bf16: large", "cuda b [1] bf16: x"],
}
FAMILIES = {"triton": "", "cuda": "", "cuda_sm90": "not built"}
ON_A_GPU = Setting(
    "cuda:0",
    machine={"checks": NAMES, "families": FAMILIES, "tiny": {"triton": NAMES["all"][:1]}},
)


def names(stage: Stage, setting: Setting = ON_A_GPU) -> list[str]:
    cases = stage.cases(setting)
    assert all(0 < case.limit < 100 for case in cases)
    return [case.name for case in cases]


def test_the_table():
    stages = groups.all_stages()
    assert len({stage.name for stage in stages}) == len(stages)
    assert groups.find("layers") is layers.LAYERS
    assert [group.seconds for group in groups.GROUPS.values()] == [150, 320, 400]
    assert list(groups.GROUPS) == ["first", "rest", "train"]


def test_groups_and_stages_are_chosen_by_name():
    (first,) = groups.chosen(["first"], [])
    assert first == groups.GROUPS["first"]
    (some,) = groups.chosen([], ["times"])
    assert [stage.name for stage in some.stages] == ["times"]
    with pytest.raises(ValueError, match="no group 'firts': expected some of first, rest, train"):
        groups.chosen(["firts"], [])
    with pytest.raises(ValueError, match="no stage 'time': expected some of"):
        groups.chosen([], ["time"])
    with pytest.raises(ValueError, match="no stage to run in rest"):
        groups.chosen(["rest"], ["times"])


def test_every_stage_lists_unique_cases_without_a_gpu():
    for stage in groups.all_stages():
        found = names(stage)
        assert found, stage.name
        assert len(set(found)) == len(found), stage.name


def test_checks_of_all_kernels_in_turn():
    assert names(correctness.CHECKS) == [NAMES["planned"][n] for n in (0, 2, 1)]
    assert names(correctness.CONFIGURATIONS) == [NAMES["all"][1]]


def test_layers_hold_what_the_bars_need():
    found = names(layers.LAYERS)
    assert found[:4] == [
        "peaks",
        "dbp: 3x3 64@56 b26",
        "triton: 3x3 64@56 b26",
        "cuda: 3x3 64@56 b26",
    ]
    for bar in bars.GPU_BARS:
        if bar.suite == "kernels":
            needed = [
                c
                for n in bars.GPU_BATCHES
                for c in registry.select(registry.RESNETS, n)
                if _in(bar, c)
            ]
            assert len(needed) >= 5
            assert {f"dbp: {case.name}" for case in needed} <= set(found)
    main = names(layers.TIMES)
    assert {name.split(": ")[1] for name in main[1:]} == set(layers._MAIN)


def _in(bar: bars.Bar, case: registry.Case) -> bool:
    record = {key: getattr(case, key) for key in ("name", "tags", "n", "D", "stride")}
    return bars.GROUPS[bar.case]({**record, "kernel": list(case.kernel)})


def test_steps_hold_what_the_bars_need():
    needed = {bar.case for bar in bars.GPU_BARS if bar.suite == "step"}
    measured: list[StepCase] = [steps.NETWORKS[n.split(": ")[1]] for n in names(steps.RATIOS)]
    assert needed <= {case.named() for case in measured}
    assert all(case.batch == 256 for case in measured)
    assert {n.split(":")[0] for n in names(steps.STEPS)} == {
        *("dbp", "dbp high", "dbp layers", "dbp layers overlap", "dbp cuda", "dbp eager"),
    }


def test_kernels_are_compiled_side_by_side_before_any_is_timed():
    rest = groups.GROUPS["rest"].stages
    assert rest[0] is tuning.COMPILATION
    assert rest[0].workers > 1


def test_calibration_measures_every_figure():
    parts = {c.name for c in groups.find("calibration").cases(ON_A_GPU)}
    assert parts == set(calibrate.parts("cuda"))


def test_every_stage_but_the_last_leaves_time_for_the_next():
    for group in groups.GROUPS.values():
        needed = sum(stage.seconds for stage in group.stages[:-1])
        assert needed + 10 <= group.seconds  # 10 s to describe the machine


def test_each_variant_of_the_code_is_compiled_once():
    compiled, timed = names(tuning.COMPILATION), names(tuning.TUNING)
    assert set(compiled) < set(timed)
    assert len(compiled) < 60
    assert {name.split(":")[0] for name in compiled} == {name.split(":")[0] for name in timed}


@pytest.mark.parametrize(("code", "status"), [(0, None), (9, "failed"), (3, "failed")])
def test_what_the_sanitizer_says_is_seen_even_of_a_worker_that_is_killed(
    code, status, tmp_path, monkeypatch, capfd
):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "begin: $*"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda: str(tool))
    found = sanitizer.run("racecheck: triton", ON_A_GPU)
    assert found.get("status") == status
    assert capfd.readouterr().out.startswith("begin: --tool racecheck --error-exitcode 9")
    if status:
        assert NAMES["all"][0] in found["output"]
        assert found["reason"] == ("errors found" if code == 9 else "exit code 3")


def test_the_suites_gpu_tests_come_from_their_files():
    found = names(suite.TESTS)
    assert found[:2] == [
        "tests/backends/cuda/test_cuda_device.py",
        "tests/backends/triton/test_device.py",
    ]
    assert "tests/optim/test_bad_numbers.py" in found
    assert all((machine.ROOT / name).exists() for name in found)


def test_a_family_that_keeps_crashing_is_left_alone(monkeypatch):
    families = ("good", "hangs", "dies", "raises", "breaks")
    cases = [Case(f"{family}: {n}", 1) for n in range(9) for family in families]
    status = {"good": "passed", "hangs": "hung", "dies": "crashed"}
    reasons = {
        "raises": "ValueError: no",
        "breaks": "AcceleratorError: CUDA error: an illegal memory access was encountered",
    }
    recorded = []

    def run_cases(command, cases, *, record, skip, **options):
        for case in cases:
            if not (reason := skip(case.name)):
                family = case.name.split(":")[0]
                line = {"case": case.name, "status": status.get(family, "raised")}
                record({**line, "reason": reasons.get(family, "")})
            else:
                assert "too often" in reason

    monkeypatch.setattr(runner, "run_cases", run_cases)
    stage = Stage("s", 9, lambda setting: cases, lambda name, setting: {})
    runner.run_stage(stage, ON_A_GPU, math.inf, recorded.append)
    counts = [sum(r["case"].startswith(f"{f}: ") for r in recorded) for f in families]
    assert counts == [9, 2, 4, 9, 4]


def test_a_stage_knows_what_time_it_has(monkeypatch):
    told = []
    monkeypatch.setattr(runner, "run_cases", lambda command, cases, **options: told.append(options))
    stage = Stage("s", 9, lambda setting: told.append(setting.left) or [], lambda name, setting: {})
    for deadline, left in ((math.inf, 9), (time.monotonic() + 5, 5)):
        told.clear()
        runner.run_stage(stage, ON_A_GPU, deadline, print)
        assert told[0] == pytest.approx(left, abs=0.1)
        assert told[1]["deadline"] == pytest.approx(time.monotonic() + left, abs=0.5)


def test_what_a_worker_is_told_survives_the_command_line():
    setting = Setting.from_text(ON_A_GPU.to_text())
    assert setting.families() == ["triton", "cuda"]
    assert "checks" not in setting.machine


def test_nothing_is_overwritten(tmp_path):
    described = {"gpu": "NVIDIA H200", "commit": "0123456789abcdef"}
    first = command._free(tmp_path, described)
    assert first.name == "nvidia-h200-0123456789.json"
    first.touch()
    assert command._free(tmp_path, described).name == "nvidia-h200-0123456789-2.json"


def test_an_unknown_group_is_a_sentence(capsys):
    assert cli.main(["device-check", "second"]) == 2
    assert "no group 'second'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dbp", "dbp layers", "dbp layers overlap", "dbp eager"])
def test_a_step_is_measured_beside_plain_backpropagation(method):
    record = steps.run(f"{method}: convnet", Setting("cpu", rehearse=True))
    assert record["status"] == "passed", record
    (step,) = record["result"]["step"]
    launched = {f"{method} launched"} - {"dbp layers overlap launched"}
    assert set(step["methods"]) == {"bp", method, *launched}
    assert step["methods"][method]["ratio"] == record["ratio"] > 0
    assert ("ratio launched" in record) == bool(launched)
    parts = step["breakdown"] if method == "dbp" else step["breakdowns"][method]
    assert parts["extra"] == pytest.approx(sum(parts.values()) - parts["extra"], rel=0.01, abs=1e-6)


def test_the_breakdown_is_of_the_backend_that_was_asked_for(monkeypatch):
    seen = []

    def breakdown(step, plain, device, rounds):
        seen.append(backends.requested())
        return {"extra": 0.0}

    monkeypatch.setattr("bench.suites.steps.breakdown", breakdown)
    steps.run("dbp eager: convnet", Setting("cpu", rehearse=True))
    steps.run("dbp: convnet", Setting("cpu", rehearse=True))
    assert seen == ["eager", "auto"]


@pytest.mark.parametrize(("method", "expected"), [("dbp", None), ("dbp high", "high")])
def test_high_is_the_precision_of_the_update_too(method, expected, monkeypatch):
    seen = set()
    within = precision.update_precision

    def update_precision(name, cuda):
        seen.add(name)
        return within(name, cuda)

    monkeypatch.setattr(precision, "update_precision", update_precision)
    steps.run(f"{method}: convnet", Setting("cpu", rehearse=True))
    assert seen == {expected}


@pytest.mark.parametrize(
    ("method", "expected"), [("dbp", [True, False]), ("dbp layers overlap", [False])]
)
def test_only_what_is_called_launched_does_without_graphs(method, expected, monkeypatch):
    seen = []
    real = dbp.DecorUpdate.__init__

    def init(self, *arguments, **options):
        seen.append(options["cuda_graph"])
        real(self, *arguments, **options)

    monkeypatch.setattr(dbp.DecorUpdate, "__init__", init)
    steps.run(f"{method}: convnet", Setting("cpu", rehearse=True))
    assert seen == expected


def test_figures_of_a_part_are_a_piece_of_a_calibration_file():
    record = groups.find("calibration").run("gbytes", Setting("cpu", rehearse=True))
    content = record["result"]["calibration"]
    assert content["device"] == machine.describe("cpu")["cpu"]
    assert content["measured"]
    assert content["figures"]["gbytes"] > 0
