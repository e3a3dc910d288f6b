"""What a call costs on the host: prepared once, it neither plans nor chooses anything again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from bench import cli, host_time, registry

ROOT = Path(__file__).parent.parent
FACTOR = 4  # other work on the machine; what a lost cache costs is far more
BACKENDS = ["cuda"] + ["triton"] * bool(importlib.util.find_spec("triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would not take CPU tensors")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [registry.conv(2, 64, 28, 3), registry.linear(2, 4096)], ids=str)
def test_a_call_stays_near_the_bar(backend, case):
    """Choosing a block for 4096 channels takes milliseconds."""
    us = host_time.measure(backend, case, pairs=5)["us"]
    assert us["public"] - us["memory"] < FACTOR * host_time.BAR


def test_the_command_prints_saves_and_judges(tmp_path, monkeypatch, capsys):
    path = tmp_path / "host-time.json"
    command = ["host-time", "--backend", "cuda", "--filter", "^linear 512 b", "--pairs", "1"]
    assert cli.main([*command, "--save", str(path)]) == 0
    (record,) = json.loads(path.read_text())["host_time"]
    assert record["launched"] == ["gram_box", "reduce"]
    assert record["us"]["dispatcher"] < record["us"]["op"]
    assert "| cuda    | linear 512 b26 | 2 " in capsys.readouterr().out
    monkeypatch.setattr(host_time, "BAR", 0.1)
    assert cli.main(command) == 1
    assert cli.main([*command, "--save", str(path)]) == 2
    assert cli.main(["host-time", "--filter", "nothing"]) == 2


def test_the_committed_result_meets_the_bar():
    result = json.loads((ROOT / "bench" / "results" / "host-time.json").read_text())
    records = result["host_time"]
    assert {r["backend"] for r in records} == set(host_time.BACKENDS)
    assert max(r["us"]["public"] - r["us"]["memory"] for r in records) <= host_time.BAR
