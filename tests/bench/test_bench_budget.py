"""The benchmark of budgets: its data, clock, loss, tables and command line."""

import copy
import json
import math

import bench_results
import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from bench import cli
from bench.core import bars, report
from bench.suites import budget
from bench.suites.budget import BudgetCase
from bench.suites.kernels import Settings
from bench.suites.steps import StepCase
from experiments.models import ConvNet

CASE = BudgetCase(
    "small",
    StepCase("small", lambda: ConvNet(3, (4, 4), image_size=8), 8, 8, 10, 3),
    (0.5, None),
    3,
    2,
)


def test_smooth_images_are_correlated_as_natural_ones():
    images = budget.smooth_images(64, 32, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 32, 32)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-5)
    near = (images[..., 1:] * images[..., :-1]).mean()
    far = (images[..., 16:] * images[..., :-16]).mean()
    channels = (images[:, 0] * images[:, 1]).mean()
    assert near > 0.9
    assert far < 0.5 * near
    assert channels > 0.5


def test_decorrelation_loss_is_the_updates_and_changes_nothing():
    torch.manual_seed(0)
    model = dbp.decorrelate_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(6, 3, 8, 8) + 0.5
    decor = dbp.DecorUpdate(model, lr=0.0)
    before = copy.deepcopy(model.state_dict())
    loss = budget.decorrelation_loss(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "num" not in k)
    assert model.training
    assert model[1].momentum == 0.1
    decor = dbp.DecorUpdate(model, lr=1e-3, sample=1.0)
    model(x)
    assert all(len(r.samples) == 1 for group in decor._recorders for r in group)
    decor.step()
    assert loss == pytest.approx(float(decor.losses()["0"]), rel=1e-5)


def test_a_case_and_its_tables(tmp_path):
    record = budget.run_budget_case(CASE, Settings())
    assert record["steps"] == 8
    limited, unlimited = record["runs"]
    assert limited["budget"] == 0.5
    for run in record["runs"]:
        assert 0 < run["share"] < 1
        assert len(run["loss"]) == len(run["seconds"]) == 5
        assert run["seconds"] == sorted(run["seconds"])
        assert all(math.isfinite(loss) for loss in run["loss"])
    assert limited["loss"][0] == unlimited["loss"][0]
    assert "planned" not in unlimited
    json.dumps(record)
    text = budget.budget_table([record])
    assert "unlimited" in text
    assert f"{limited['share'] / 0.5:.2f}" in text
    budget.plot_budget([record], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


BAR = "convnet 32x32 b128: actual over requested share of the step <= 1.25"


def _judged(records: list[dict]) -> bars.Verdict:
    result = {**bench_results.synthetic(), "budget": records}
    return next(v for v in bars.evaluate(result) if v.bar.text == BAR)


def test_the_bar_on_shares():
    name = "convnet 32x32 b128"
    good = bench_results.shared(name, 1.2)
    assert _judged([good]).status == bars.MET
    late = copy.deepcopy(good)
    late["runs"][2]["share"] = 0.07
    verdict = _judged([late])
    assert (verdict.status, verdict.where) == (bars.MISSED, "worst 5%")
    assert verdict.figure == pytest.approx(1.4)
    assert _judged([]).status == bars.NOT_MEASURED
    assert _judged([bench_results.shared("resnet18 32x32 b128", 1)]).status == bars.NOT_MEASURED
    assert _judged([bench_results.shared(name, 1, steps=10)]).why == "5 steps, 9 needed"
    partial = {**good, "runs": good["runs"][1:]}
    assert _judged([partial]).why == "no run at 1%"
    single = [{**good, "runs": [run]} for run in good["runs"]]  # one budget a record
    assert _judged(single).status == bars.MET


def test_cases_can_be_run_one_by_one():
    names = [case.name for case in budget.BUDGET_CASES]
    assert len(names) == len(set(names))
    assert {b for c in budget.BUDGET_CASES for b in c.budgets} == {0.01, 0.02, 0.05, 0.1, None}


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "BUDGET_CASES", (CASE,))
    target = tmp_path / "result.json"
    assert cli.main(["--suite", "budget", "--pairs", "2", "--save", str(target)]) == 0
    assert "actual share" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert result["budget"][0]["steps"] == 7
    assert "budgets" in report.text_report(result)
    assert cli.main(["report", str(target)]) == 0
    assert target.with_suffix(".png").exists()
    assert cli.main(["--suite", "budget", "--device", "meta"]) == 2
    assert "--device cpu" in capsys.readouterr().err
