"""The one command for a GPU machine, rehearsed: stages, time limits, signals, the result file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cli, device_check, kernels, peaks, registry, stages
from bench.stages import Run, Stage

ROOT = Path(__file__).parent.parent


def check(tmp_path, *several, budget: float = 60) -> tuple[int, dict]:
    path = tmp_path / "result.json"
    code = device_check.main(
        ["--device", "cpu", "--save", str(path), "--budget", str(budget)], several
    )
    return code, json.loads(path.read_text())


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def passing(run):
    return {"status": "passed", "cases": 1}


def test_all_stages_pass(tmp_path):
    code, result = check(tmp_path, Stage("one", 9, passing), Stage("two", 9, passing))
    assert code == 0
    assert result["complete"]
    assert {c["status"] for c in result["checks"].values()} == {"passed"}
    assert "| one" in (tmp_path / "result.md").read_text()


def test_a_failing_stage_fails_the_run_and_the_next_one_runs(tmp_path, capsys):
    def failing(run):
        raise ValueError("wrong result")

    code, result = check(tmp_path, Stage("one", 9, failing), Stage("two", 9, passing))
    assert code == 1
    assert result["complete"]
    assert result["checks"]["one"]["reason"] == "ValueError: wrong result"
    assert result["checks"]["two"]["status"] == "passed"
    assert "wrong result" in capsys.readouterr().out


def test_a_stage_out_of_time_leaves_what_it_has(tmp_path):
    def slow(run):
        for n in range(100):
            run.result["note"] = n
            time.sleep(0.02)
            run.check_time()

    code, result = check(tmp_path, Stage("slow", 0.2, slow), Stage("two", 9, passing))
    assert code == 1
    assert result["checks"]["slow"]["status"] == "cut short"
    assert 0 < result["note"] < 99
    assert result["checks"]["two"]["status"] == "passed"
    assert not result["complete"]


def test_the_budget_ends_the_run(tmp_path):
    def slow(run):
        time.sleep(0.3)
        return {"status": "passed"}

    code, result = check(tmp_path, Stage("one", 9, slow), Stage("two", 9, slow), budget=0.2)
    assert code == 1
    assert result["checks"]["two"]["status"] == "cut short"


def test_sigterm_leaves_what_it_has(tmp_path):
    """In a process of its own, terminated in the middle of the second stage."""
    path = tmp_path / "result.json"
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from bench import device_check
from bench.stages import Stage
def one(run):
    run.result["kernels"] = []
    return {{"status": "passed"}}
def two(run):
    print("second", flush=True)
    time.sleep(60)
arguments = ["--device", "cpu", "--save", {str(path)!r}]
sys.exit(device_check.main(arguments, [Stage("one", 99, one), Stage("two", 99, two)]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "second\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 1
    result = json.loads(path.read_text())
    assert result["checks"]["one"]["status"] == "passed"
    assert result["checks"]["two"]["status"] == "cut short"
    assert not result["complete"]


def pytest_run(tmp_path, text: str, seconds: float) -> dict:
    file = tmp_path / "test_some.py"
    file.write_text(text)
    run = Run({"checks": {}}, tmp_path / "r.json", time.monotonic() + seconds)
    run.limit = run.deadline
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        return stages.pytest_stage(run, ["-p", "no:cacheprovider", "--rootdir", tmp_path, file])
    finally:
        os.chdir(here)


def test_pytest_outcomes_are_counted(tmp_path):
    text = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_other(): pytest.skip("not here")
@pytest.fixture
def broken(): raise ValueError
def test_set_up(broken): pass
"""
    record = pytest_run(tmp_path, text, 60)
    assert record["status"] == "failed"
    assert record["outcomes"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert "assert 1 == 2" in record["failures"][0]["why"]
    assert pytest_run(tmp_path, "def test_right(): pass", 60)["status"] == "passed"
    assert pytest_run(tmp_path, "", 60)["status"] == "failed"  # no tests
    assert pytest_run(tmp_path, "import nothing_like_it", 60)["status"] == "failed"


def test_pytest_cut_short_keeps_its_outcomes(tmp_path):
    text = """
import time
def test_quick(): pass
def test_endless(): time.sleep(300)
"""
    begin = time.monotonic()
    record = pytest_run(tmp_path, text, 8)
    assert time.monotonic() - begin < 60
    assert record["status"] == "cut short"
    assert record["outcomes"] == {"passed": 1}


def test_bench_stage_on_small_cases(tmp_path, monkeypatch):
    cases = [registry.conv(2, 4, 6, 3, tags=("resnet18",)), registry.linear(30, 5)]
    monkeypatch.setattr(device_check, "bench_cases", lambda: cases)
    monkeypatch.setattr(device_check, "PAIRS", 1)
    monkeypatch.setattr(device_check, "DTYPE", torch.float32)
    monkeypatch.setattr(peaks, "SIDE", {"cpu": 64})
    code, result = check(tmp_path, Stage("bench", 60, device_check.bench))
    assert code == 0, result["checks"]
    assert [record["name"] for record in result["kernels"]] == [case.name for case in cases]
    for record in result["kernels"]:
        ours = record["methods"]["dbp"]
        expected = record["useful_gflop"] / 1e3 / ours["seconds"]["median"]
        assert ours["useful_tflops"] == pytest.approx(expected, rel=1e-2)
        assert 0 < ours["of_peak"] < 50
    assert result["peaks"]["gemm_tflops"] > 0


def test_a_wrong_kernel_fails_the_bench_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(device_check, "bench_cases", lambda: [registry.conv(2, 4, 6, 3)])
    monkeypatch.setattr(peaks, "SIDE", {"cpu": 64})
    honest = kernels.patch_gram
    monkeypatch.setattr(kernels, "patch_gram", lambda x, case: honest(x, case) + 0.1)
    code, result = check(tmp_path, Stage("bench", 60, device_check.bench))
    assert code == 1
    assert "error" in result["checks"]["bench"]["wrong"]["3x3 4@6 b2"]


def test_bench_cases_hold_what_the_bars_need():
    names = [case.name for case in device_check.bench_cases()]
    assert len(set(names)) == len(names)
    assert {"3x3 64@56 b256", "3x3 256@14 b26", "1x1 2048@7 b256", "5x5 64@27 b16"} <= set(names)


def test_nothing_is_overwritten(tmp_path):
    machine = {"gpu": "NVIDIA H200", "commit": "0123456789abcdef"}
    first = device_check._free(tmp_path, machine)
    assert first.name == "nvidia-h200-0123456789.json"
    first.touch()
    assert device_check._free(tmp_path, machine).name == "nvidia-h200-0123456789-2.json"


def test_stages_fit_the_budget():
    assert sum(stage.seconds for stage in device_check.STAGES) <= 580
    assert device_check.STAGES[0].name == "kernel tests"


def test_an_installed_package_is_checked_from_a_folder_without_the_source(monkeypatch):
    started = []
    monkeypatch.setattr(os, "chdir", started.append)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    device_check.main(["--installed", "--device", "cpu", "--budget", "5"])
    folder, command = started
    assert (Path(folder) / "tests" / "conftest.py").exists()
    assert (Path(folder) / "bench" / "__main__.py").exists()
    assert not (Path(folder) / "dbp_kernels").exists()
    assert command[1:] == ["-m", "bench", "device-check", "--device", "cpu", "--budget", "5"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["device-check", "tune"])
def test_without_a_gpu_one_sentence_says_so(command, capsys):
    assert cli.main([command]) == 2
    message = capsys.readouterr().err.strip()
    assert "CUDA device" in message
    assert len(message.splitlines()) == 1
