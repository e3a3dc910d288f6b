"""The device check rehearsed on a CPU, with cases that crash, hang, raise, are wrong, need too much.

Each is reported under its own name, no other case is lost, every limit is kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import cli
from bench.device import command, faults, groups
from dbp_kernels import __main__ as package

ROOT = Path(__file__).parents[3]
NO_CHECKS = find_spec("dbp_kernels.verify.cases") is None
NO_TRITON = find_spec("triton") is None


def rehearsal(folder: Path, *arguments: str) -> tuple[list[str], Path]:
    """(the command line, where its result goes)."""
    path = folder / "result.json"
    fixed = ["device-check", "--device", "cpu", "--rehearse", "--save", str(path)]
    return [sys.executable, "-m", "bench", *fixed, *arguments], path


def read(path: Path) -> tuple[dict, dict[str, dict]]:
    """The result, and {stage: {case: its line}}, which must agree."""
    lines: dict[str, dict] = {}
    for text in path.with_suffix(".jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line["case"] not in lines.setdefault(line["stage"], {}), line
        lines[line["stage"]][line["case"]] = line
    result = json.loads(path.read_text())
    for stage, cases in lines.items():
        assert [c["case"] for c in result["checks"][stage]["cases"]] == list(cases)
    return result, lines


def check_faults(cases: dict[str, dict]) -> None:
    """All of them are there by name and status, and all other cases passed or say why not."""
    for name, expected in faults.EXPECTED.items():
        assert cases[name]["status"] == expected, cases[name]
        assert cases[name]["reason"]
    limit = faults.LIMITS["fault hang"]
    assert limit <= cases["fault hang"]["seconds"] < limit + 2
    assert cases["fault abort"]["signal"] == "SIGABRT"
    for name, case in cases.items():
        if name not in faults.EXPECTED:
            assert case["status"] in ("passed", "skipped"), case
            assert case["status"] == "passed" or case["reason"]


def test_a_stage_with_cases_that_go_wrong(tmp_path):
    arguments, path = rehearsal(tmp_path, "--stages", "times", "--budget", "120")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr
    result, lines = read(path)
    check_faults(lines["times"])
    assert result["complete"]
    assert result["settings"]["rehearsal"]
    assert result["checks"]["times"]["status"] == "failed"
    assert "fault hang: hung" in done.stdout
    (first, _) = result["kernels"]
    assert first["name"] == "3x3 4@6 b2"
    assert {"dbp", "unfold", "self_wgrad"} <= set(first["methods"])
    for method in first["methods"].values():
        assert method["replay"]["median"] > 0
    if not NO_TRITON:
        assert first["backends"]["triton"]["status"] == "ok"
    assert first["methods"]["dbp"]["of_peak"] > 0
    assert "| times" in path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(NO_CHECKS or NO_TRITON, reason="no kernel to check")
def test_the_kernels_checks_with_cases_that_go_wrong(tmp_path):
    arguments, path = rehearsal(tmp_path, "--stages", "checks", "--budget", "120")
    subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=150)
    _, lines = read(path)
    check_faults(lines["checks"])
    ours = [case for name, case in lines["checks"].items() if name not in faults.EXPECTED]
    assert ours
    keys = {"kernel", "configuration", "dtype", "geometry", "error", "bound", "seconds", "status"}
    assert all(keys <= case.keys() for case in ours)


def test_what_there_is_survives_a_signal(tmp_path):
    arguments, path = rehearsal(tmp_path, "--stages", "times,matrices")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = path.with_suffix(".jsonl")
    while not (log.exists() and '"stage": "times"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    result, lines = read(path)
    statuses = {case["status"] for case in lines["times"].values()}
    assert "not run" in statuses
    assert set(faults.EXPECTED) < set(lines["times"])  # what was not run says so too
    assert not result["complete"]
    assert result["checks"]["matrices"]["status"] == "not run"
    assert "interrupted" in output


def test_the_budget_ends_the_run(tmp_path):
    arguments, path = rehearsal(tmp_path, "first", "--budget", "8")
    subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    result, lines = read(path)
    assert 8 <= result["took_seconds"] < 8 + 5
    assert not result["complete"]
    assert result["checks"]["ratios"]["status"] == "cut short"
    assert lines["ratios"]["dbp: convnet"]["status"] == "not run"


@pytest.mark.slow
@pytest.mark.skipif(NO_CHECKS or NO_TRITON, reason="no kernel to check")
@pytest.mark.parametrize("group", [name for name, g in groups.GROUPS.items() if g.stages])
def test_a_whole_group(tmp_path, group):
    """Within its time, with nothing lost in any stage."""
    seconds = 400
    arguments, path = rehearsal(tmp_path, group, "--budget", str(seconds))
    subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 60)
    result, lines = read(path)
    assert result["took_seconds"] < min(seconds, groups.GROUPS[group].seconds) + 5
    whole = set()
    for stage in groups.GROUPS[group].stages:
        if "not run" not in result["checks"][stage.name]["outcomes"]:
            check_faults(lines[stage.name])
            whole.add(stage.name)
    # the last stage has what the others leave
    assert whole >= {stage.name for stage in groups.GROUPS[group].stages[:-1]}, whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command_line", [(cli.main, "device-check"), (package.main, "tune")])
def test_without_a_gpu_one_sentence_says_so(command_line, capsys):
    main, name = command_line
    assert main([name]) == 2
    message = capsys.readouterr().err.strip()
    assert "CUDA device" in message
    assert len(message.splitlines()) == 1


def test_an_installed_package_is_checked_from_a_folder_without_the_source(monkeypatch):
    started = []
    monkeypatch.setattr(os, "chdir", started.append)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    command.main(["--installed", "--device", "cpu", "--budget", "5"])
    folder, arguments = started
    assert (Path(folder) / "tests" / "conftest.py").exists()
    assert (Path(folder) / "bench" / "__main__.py").exists()
    assert not (Path(folder) / "dbp_kernels").exists()
    assert arguments[1:] == ["-m", "bench", "device-check", "--device", "cpu", "--budget", "5"]
