"""``python -m bench check``: committed ratios against a quick run's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from bench_results import method, synthetic

from bench import cli
from bench.core import bars, regress

KEY = ("kernels", "3x3 64@56 b32")
CPU = torch.device("cpu")


def record(ours: float, unfold: float) -> dict:
    return {"name": KEY[1], "methods": {"dbp": method(ours), "unfold": method(unfold)}}


def checked(*runs: dict) -> tuple[list, list, int]:
    """(comparisons, failures, number of runs) of a case committed at 6x."""
    left = list(runs)
    committed = {KEY: record(1.0, 6.0)}
    found = regress.check({KEY: lambda: left.pop(0)}, committed, lambda text: None)
    return *found, len(runs) - len(left)


def test_noise_passes_and_a_loss_fails_only_twice_in_a_row():
    slow, noisy = record(1.0, 4.1), record(1.0, 4.3)
    assert checked(noisy)[1:] == ([], 1)
    assert checked(slow, noisy)[1:] == ([], 2)
    comparisons, failures, runs = checked(slow, slow)
    assert runs == 2
    assert len(comparisons) == 1
    assert "unfold took 4.10 times as long as ours, 6.00 as committed" in failures[0]


def test_a_wrong_result_fails_at_once():
    wrong = record(1.0, 6.0)
    wrong["methods"]["dbp"] = {"status": "wrong", "reason": "error 1"}
    assert checked(wrong)[1:] == ([f"{KEY[1]}: wrong: error 1"], 1)


def test_ratios_count_and_not_seconds():
    assert checked(record(10.0, 60.0))[1] == []


def save(folder, name: str, started: str, change=lambda result: None) -> None:
    result = synthetic()
    result["started"] = started
    change(result)
    (folder / name).write_text(json.dumps(result))


def test_the_latest_comparable_result_counts(tmp_path):
    def faster(result):
        for r in result["kernels"]:
            r["methods"]["dbp"] = method(0.001)

    def on_gpu(result):
        faster(result)
        result["settings"]["device"] = "cuda"

    def at_full_sample(result):
        result["step"][0]["sample"] = 1.0
        result["step"][0]["methods"]["dbp"] = method(99.0)
        result["kernels"] = []

    save(tmp_path, "a.json", "2026-02-01", faster)
    save(tmp_path, "b.json", "2026-01-01")
    save(tmp_path, "c.json", "2026-03-01", on_gpu)
    save(tmp_path, "d.json", "2026-04-01", at_full_sample)
    found = regress.committed_records(tmp_path, CPU, 2, "any")
    assert bars.speedup(found[KEY], "unfold") == pytest.approx(70)
    assert found["step", "convnet 32x32 b128"]["methods"]["dbp"]["seconds"]["median"] == 0.21
    assert regress.committed_records(tmp_path, CPU, 64, "any") == {}


def test_results_of_the_same_processor_come_first(tmp_path):
    def slower(result):
        result["machine"]["cpu"] = "This one"
        for r in result["kernels"]:
            r["methods"]["dbp"] = method(0.02)

    save(tmp_path, "a.json", "2026-01-01", slower)
    save(tmp_path, "b.json", "2026-02-01")
    for processor, expected in (("This one", 3.5), ("another", 7)):
        found = regress.committed_records(tmp_path, CPU, 2, processor)
        assert bars.speedup(found[KEY], "unfold") == pytest.approx(expected)


def test_every_quick_job_is_committed():
    jobs = regress.quick_jobs(CPU)
    assert len(jobs) > 5
    assert jobs.keys() <= regress.committed_records(regress.RESULTS, CPU, 2, "any").keys()


def test_command_line(tmp_path, monkeypatch, capsys):
    save(tmp_path, "a.json", "2026-02-01", lambda r: r["machine"].update(threads=1))
    now = copy.deepcopy(record(0.01, 0.07))
    monkeypatch.setattr(regress, "quick_jobs", lambda device: {KEY: lambda: now})
    assert cli.main(["check", "--results", str(tmp_path)]) == 0
    assert "nothing fell below 0.7" in capsys.readouterr().out
    now["methods"]["unfold"] = method(0.02)
    assert cli.main(["check", "--results", str(tmp_path)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert cli.main(["check", "--results", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
