"""Benchmark suite "memory": peaks of whole steps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import cli
from bench.core import memory, networks
from bench.suites import footprint, kernels, steps
from bench.suites.footprint import memory_table


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    )


TINY = networks.StepCase("tiny 6x6", small, 8, 6, 5, 2)
PARAMETERS = 4 * 27 + 4 + 5 * 144 + 5


def test_peak_and_live():
    kept = []

    def call() -> None:
        kept.append(torch.zeros(250_000))
        torch.zeros(500_000)
        torch.zeros(500_000)

    peak, live = memory.peak_and_live(call)
    assert 3_000_000 <= peak < 3_010_000
    assert 1_000_000 <= live < 1_010_000


def test_memory_of_a_step():
    record = footprint.run_memory_case(TINY, kernels.Settings())
    methods = record["methods"]
    assert {m["status"] for m in methods.values()} == {"ok"}
    assert record["R_bytes"] == 4 * (27**2 + 144**2)
    # weights, gradients, two moments; and R
    assert methods["bp"]["resident_bytes"] == pytest.approx(16 * PARAMETERS, abs=3000)
    resident = {name: method["resident_bytes"] for name, method in methods.items()}
    samples = 4 * (3 * 36 + 144)  # one image's inputs of both layers
    held = resident["dbp layers"] - resident["bp"]
    assert held == pytest.approx(record["R_bytes"] + samples, abs=1500)
    # and W, where the model's own weights are A
    weights = 4 * (4 * 27 + 5 * 144)
    assert resident["dbp"] - resident["dbp layers"] == pytest.approx(weights, abs=1500)
    assert methods["dbp"]["peak_bytes"] > methods["bp"]["peak_bytes"] + record["R_bytes"]
    assert "tiny 6x6 b8" in memory_table([record])


def test_a_wrong_variant_gets_no_number(monkeypatch):
    def wrong(model, sample, dtype):
        with torch.no_grad():
            model[0].weight.mul_(3)
        return steps.plain_step(model, dtype)

    monkeypatch.setattr(steps, "attached_step", wrong)
    record = footprint.run_memory_case(TINY, kernels.Settings())
    assert record["methods"]["dbp"]["status"] == "wrong"
    assert "peak_bytes" not in record["methods"]["dbp"]
    assert "wrong" in memory_table([record])


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(footprint, "CPU_CASES", (TINY,))
    target = tmp_path / "memory.json"
    assert cli.main(["--suite", "memory", "--filter", "tiny", "--save", str(target)]) == 0
    (record,) = json.loads(target.read_text())["memory"]
    assert set(record["methods"]) == {"bp", "dbp", "dbp layers", "published"}
    assert "peak memory of training" in capsys.readouterr().out
    assert cli.main(["report", str(target)]) == 0
    assert target.with_suffix(".png").stat().st_size > 1000
