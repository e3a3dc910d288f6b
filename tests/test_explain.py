"""``explain``: one row per layer, the planner's own choices, nothing changed in the model."""

import importlib
import weakref

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import precision
from dbp_kernels.planning.planner import update_choices


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 3, stride=2, padding="valid", groups=2),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10),
    )


@pytest.mark.parametrize("decorrelated", [False, True])
def test_rows_describe_the_layers(decorrelated):
    model = small_network()
    if decorrelated:
        dbp.decorrelate_model(model)
    x = torch.randn(20, 3, 16, 16)
    explanation = dbp.explain(model, x, sample=0.1)
    names = [r.name for r in explanation.layers]
    assert names == ["0", "2", "3", "5"]
    first, second, third, fourth = explanation.layers
    assert (first.geometry.dim, first.geometry.samples) == (27, 2 * 16 * 16)
    assert (second.geometry.dim, second.geometry.groups, second.geometry.samples) == (36, 2, 2 * 49)
    assert (third.geometry.dim, third.geometry.samples) == (6, 2 * 49)
    assert (fourth.geometry.dim, fourth.geometry.samples) == (256, 2)
    # 6 operations per multiply-add pair of the forward pass
    assert first.step_gflop == pytest.approx(6 * 20 * 8 * 16 * 16 * 27 / 1e9)
    assert second.step_gflop == pytest.approx(6 * 20 * 6 * 7 * 7 * 36 / 1e9)
    assert third.step_gflop == pytest.approx(6 * 20 * 6 * 7 * 7 * 4 * 4 / 1e9)
    assert fourth.step_gflop == pytest.approx(6 * 20 * 256 * 10 / 1e9)
    for row in explanation.layers:
        assert row.plans == update_choices(row.geometry, "cpu", 4)


def test_plans_are_those_of_an_update_of_the_default_precision(monkeypatch):
    asked = []

    def choices(geometry, device_type, dtype):
        asked.append((dtype, precision.update_products()))
        return update_choices(geometry, device_type, 4)

    module = importlib.import_module("dbp_kernels.explanation")  # dbp.explain is the function
    monkeypatch.setattr(module, "update_choices", choices)
    model, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16)
    dbp.explain(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        dbp.explain(model, x)
    assert asked == [(torch.float32, "tf32x3"), (torch.bfloat16, "tf32x3")]


def test_prints_a_table_with_choice_and_alternatives():
    text = str(dbp.explain(nn.Conv2d(64, 64, 3, padding=1), torch.randn(4, 64, 28, 28), sample=1.0))
    header, rule, row, total, *_ = text.splitlines()
    for column in ("layer", "D", "n", "plan", "GFLOP", "of step", "alternatives"):
        assert column in header
    assert set(rule) == {"-"}
    assert row.startswith("Conv2d")
    assert "576" in row
    assert str(4 * 28 * 28) in row
    assert "gram: shift" in row
    assert "direct" in row
    assert "unfold" in row
    assert total.startswith("all")


def test_changes_nothing():
    model = small_network()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dbp.explain(model, torch.randn(2, 3, 16, 16))
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model)


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match=r"model=ReLU"):
        dbp.explain(nn.ReLU(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("options", "name"),
    [({"sample": 0}, "sample"), ({"sample": 1.5}, "sample"), ({"update_every": 0}, "update_every")],
)
def test_options_are_checked_as_by_the_optimiser(options, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        dbp.explain(nn.Linear(3, 2), torch.randn(2, 3), **options)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, *, scale):
        return self.layer(input=x) * scale


def test_layers_and_models_called_by_keyword():
    explanation = dbp.explain(ByKeyword(), {"x": torch.randn(4, 3), "scale": 2.0}, sample=0.5)
    (row,) = explanation.layers
    assert (row.name, row.geometry.dim, row.geometry.samples) == ("layer", 3, 2)


def test_no_activation_is_kept():
    alive = []

    class Watch(nn.Module):
        def forward(self, x):
            assert all(reference() is None for reference in alive)
            y = x + 1
            alive.append(weakref.ref(y))
            return y

    layers = [module for _ in range(3) for module in (Watch(), nn.Linear(3, 3))]
    assert len(dbp.explain(nn.Sequential(*layers), torch.randn(2, 3)).layers) == 3
    assert len(alive) == 3


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match=r"'1' with shape \(0, 3\): expected a batch"):
        dbp.explain(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), torch.randn(0, 3))
