"""What a call costs on the host: prepared once, it neither plans nor chooses anything again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from bench import cli
from bench.core import registry
from bench.suites import host_time
from dbp_kernels import backends, choose

ROOT = Path(__file__).parents[2]
FACTOR = 4  # other work on the machine; what a lost cache costs is far more
BACKENDS = ["cuda"] + ["triton"] * bool(importlib.util.find_spec("triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would not take CPU tensors")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [registry.conv(2, 64, 28, 3), registry.linear(2, 4096)], ids=str)
def test_a_call_stays_near_the_bar(backend, case):
    """Choosing a block for 4096 channels takes milliseconds."""
    us = host_time.measure(backend, case, pairs=5)["us"]
    assert us["public"] - us["memory"] < FACTOR * host_time.BAR


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would not take CPU tensors")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_decides_once(backend, monkeypatch):
    """It asks for the backend once, for each layer's plan once, and calls its functions directly."""
    net = nn.Sequential(*[dbp.nn.DecorConv2d(8, 8, 3, padding="same") for _ in range(4)])
    net.append(dbp.nn.DecorConv2d(8, 200, 1)).append(dbp.nn.DecorConv2d(200, 8, 3))
    decor = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
    launched, asked = [], {}

    def count(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            asked[name] = asked.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    with host_time.stubbed(backend, launched.append):
        for _ in range(2):  # the first time, launches are prepared
            net(torch.randn(8, 8, 12, 12))
            first = launched.copy()
            if first:
                count(backends, "selected")
                for name in ("update_choices", "gram_choices"):
                    count(choose.planner, name)
            with torch.autograd.profiler.profile() as profile:
                decor.step()
    assert launched == 2 * first != []
    assert asked == {"selected": 1, "update_choices": len(net)}
    assert not [event.key for event in profile.key_averages() if event.key.startswith("dbp::")]


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
