"""Benchmark suite "update": the networks, the check of R before the clock, untimed preparation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cli, suites
from bench.core import networks, plots, suite
from bench.suites import accumulation, kernels, passes, updates
from bench.suites.updates import update_table
from dbp_kernels.tools import timing
from experiments.models import resnet50
from experiments.models.vit import Block

FAST = kernels.Settings(pairs=2, warmup=1)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    )


TINY = networks.StepCase("tiny 6x6", small, 8, 6, 5, 2)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(networks.AlexNet, 61_100_840), (networks.ViT, 22_050_664)],  # torchvision's, timm's
)
def test_networks_have_the_published_sizes(build, parameters):
    with torch.device("meta"):
        model = build()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_attention_is_torchs():
    torch.manual_seed(0)
    block = Block(8, 2)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj.weight,
            "out_proj.bias": block.proj.bias,
        }
    )
    nn.init.zeros_(block.fc2.weight)
    nn.init.zeros_(block.fc2.bias)
    x = torch.randn(3, 5, 8)
    normed = block.norm1(x)
    torch.testing.assert_close(block(x), x + attention(normed, normed, normed)[0])


def test_an_update_is_checked_and_timed():
    record = updates.run_update_case(TINY, FAST, sample=0.5)
    assert (record["name"], record["images"]) == ("tiny 6x6 b8", 4)
    assert record["R_bytes"] == 4 * (27**2 + 144**2)
    assert set(record["methods"]) == {"dbp", "published"}
    for method in record["methods"].values():
        assert method["status"] == "ok"
        assert method["seconds"]["samples"] == 2
    assert 0 < record["methods"]["dbp"]["error"] < updates.BOUND
    assert "tiny 6x6 b8" in update_table([record])


def test_an_update_that_differs_gets_no_number(monkeypatch):
    def half(model, forward):
        right = updates.our_update(model, forward)
        return replace(right, update=lambda lr: right.update(lr / 2))

    monkeypatch.setitem(updates.MAKERS, "dbp", half)
    record = updates.run_update_case(TINY, FAST)
    assert record["methods"]["dbp"]["status"] == "wrong"
    assert "seconds" not in record["methods"]["dbp"]
    assert record["methods"]["published"]["status"] == "ok"


def test_disagreement_and_reset():
    eye = torch.eye(3)
    changed = eye + 0.1
    assert updates.disagreement({"a": changed}, {"a": changed}) == 0
    assert updates.disagreement({"a": changed + 0.05}, {"a": changed}) == pytest.approx(0.5)
    assert updates.disagreement({"a": changed[None]}, {"a": changed}) == 0
    assert updates.disagreement({"b": changed}, {"a": changed}) == float("inf")
    assert updates.disagreement({"a": changed * float("nan")}, {"a": changed}) == float("inf")
    layer = nn.Module()
    layer.register_buffer("R", torch.randn(2, 3, 3))
    updates.reset(layer)
    torch.testing.assert_close(layer.R, eye.expand(2, 3, 3))


def test_preparation_comes_before_every_call_and_is_not_timed():
    order: list[str] = []

    def prepare() -> None:
        torch.randn(300, 300) @ torch.randn(300, 300)
        order.append("prepare")

    times = timing.time_interleaved(
        {"a": lambda: order.append("a")}, 3, warmup=1, prepare={"a": prepare}
    )
    assert order == ["prepare", "a"] * 4
    assert times["a"].calls == 1
    assert times["a"].median < 1e-4


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(updates, "CPU_CASES", (TINY,))
    target = tmp_path / "update.json"
    options = ["--suite", "update", "--filter", "tiny", "--batch", "3", "--quick"]
    assert cli.main([*options, "--save", str(target)]) == 0
    (record,) = json.loads(target.read_text())["update"]
    assert record["name"] == "tiny 6x6 b3"
    assert record["methods"]["dbp"]["seconds"]["samples"] == suite.QUICK_PAIRS
    assert "one update of every layer" in capsys.readouterr().out
    assert cli.main(["report", str(target)]) == 0
    assert target.with_suffix(".png").stat().st_size > 1000


def test_a_cpu_measures_what_it_can_unless_asked():
    def names(*arguments: str) -> list[str]:
        return [job.name for job in suites.jobs(cli.parser().parse_args(arguments))]

    default = names("--suite", "update")
    assert "resnet18 32x32 b128" in default
    assert "alexnet 224x224 b32" not in default
    assert names("--suite", "update", "--filter", "alexnet") == ["alexnet 224x224 b32"]


def test_steps_of_several_micro_steps():
    record = accumulation.run_accumulation_case(TINY, FAST, sample=0.5)
    names = ["bp", "dbp", accumulation.LAYERS]
    assert [(n, m["status"]) for n, m in record["methods"].items()] == [(n, "ok") for n in names]
    assert all(m["seconds"]["samples"] == 2 for m in record["methods"].values())
    text = suites.SUITES["accumulation"].table([record])
    assert all(f"| {name} " in text for name in names)


def test_passes_and_the_step_by_itself(tmp_path):
    record = passes.run_passes_case(TINY, FAST, sample=0.5)
    names = ["bp", "dbp", "dbp layers"]
    assert [(n, m["status"]) for n, m in record["methods"].items()] == [(n, "ok") for n in names]
    assert all(m["seconds"]["samples"] == 2 for m in record["methods"].values())
    assert [(n, s["samples"]) for n, s in record["step"].items()] == [(n, 2) for n in names]
    text = suites.SUITES["passes"].table([record])
    assert all(f"| {name} " in text for name in names)
    (panel,) = suites.SUITES["passes"].panels({"passes": [record]})
    plots.draw([panel], "title", tmp_path / "passes.png")
    assert (tmp_path / "passes.png").stat().st_size > 1000


def test_a_network_that_is_wrong_gets_no_times(monkeypatch):
    honest = passes._network

    def wrong(model, method, *rest):
        if method == "dbp":
            torch.nn.init.zeros_(model[-1].weight)
        return honest(model, method, *rest)

    monkeypatch.setattr(passes, "_network", wrong)
    record = passes.run_passes_case(TINY, FAST, sample=0.5)
    assert record["methods"]["dbp"]["status"] == "wrong"
    assert "dbp" not in record["step"]


def test_the_narrow_network_has_every_layer_of_resnet50():
    wide, narrow = resnet50(10), passes.narrow_resnet50()
    kinds = lambda model: [type(layer) for layer in model.modules()]  # noqa: E731
    assert kinds(narrow) == kinds(wide)
    assert narrow(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert narrow.fc.in_features * passes.NARROW == wide.fc.in_features
