"""``python -m bench precision``: roundings, plans, and what the committed run says of the defaults."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import random

from bench import cli
from bench.core import results
from bench.suites import precision
from dbp_kernels import rules
from dbp_kernels.rules import UpdateRule

COMMITTED = json.loads((results.RESULTS / "precision" / "update.json").read_text())


@pytest.mark.parametrize(
    ("name", "bits", "whole"),
    [
        ("tf32", 10, lambda x: (x.abs() + 0.5).floor() * x.sign()),  # ties away from zero
        ("tf32_cut", 10, torch.trunc),
        ("bf16", 7, torch.round),  # ties to even
    ],
)
def test_roundings(name, bits, whole):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(3)
    rounded = getattr(precision, name)(x)
    mantissa, exponent = torch.frexp(x.double())
    expected = torch.ldexp(whole(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)
    assert torch.equal(rounded.double(), expected)
    assert not torch.equal(rounded, x)


def test_three_terms_have_twice_the_digits():
    X, Y = random((40, 60), torch.float32), random((60, 50), torch.float32, 1)
    exact = X.double() @ Y.double()
    error = {
        name: (p(X, Y) - exact).norm() / exact.norm() for name, p in precision.PRODUCTS.items()
    }
    assert error["tf32x3"] < 1e-6 < 1e-4 < error["tf32"] < error["bf16"]


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("plan", precision.PLANS)
def test_updates_are_those_of_the_plans(plan, rule):
    Z, R = random((2, 9, 7)), torch.eye(7, dtype=torch.float64) + 0.1 * random((2, 7, 7), seed=1)
    weights = UpdateRule.make(rule, 0.3, 7)
    lr = torch.full((2, 1, 1), 0.1, dtype=torch.float64)
    ours = precision.update(plan, Z, R, lr, weights, [torch.matmul] * 4)
    expected, loss = rules.update_direct(Z, R, 0.1, 0.3, rule)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(precision.loss(R, Z.mT @ Z / 9, weights), loss)


@pytest.mark.parametrize("regime", precision.REGIMES)
def test_a_case_compares_with_float64(regime, monkeypatch):
    monkeypatch.setattr(precision, "_FRESH_STEPS", 100)
    case = precision.Case("gram", regime, 16, 1e6, 0.5, seeds=2)
    record = precision.run_case(case)
    figures = record["variants"]
    assert set(figures) == set(precision.VARIANTS)
    assert figures["all float32"]["ratio"] == pytest.approx(1, abs=0.05)
    assert figures["all float32"]["distance"] < figures["last tf32"]["distance"] < 0.1
    if regime == "fixed":
        assert record["loss"] <= precision.CONVERGED
        assert figures["all tf32"]["ratio"] is None  # R is not finite
    assert precision.run_case(case) == record


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "CONDITIONS", (1e2,))
    target = tmp_path / "folder" / "run.json"
    assert cli.main(["precision", "--quick", "--save", str(target)]) == 0
    result = json.loads(target.read_text())
    assert precision.report(result["cases"]) in capsys.readouterr().out
    assert len(result["cases"]) == 3
    assert target.with_suffix(".png").stat().st_size > 1000
    assert cli.main(["precision", "--save", str(target)]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("plan", precision.PLANS)
def test_the_committed_run_supports_the_default(plan):
    """Rounded to the nearest, or cut: which one it is depends on the library."""
    assert COMMITTED["settings"]["products"] == {
        name: list(products) for name, products in precision.VARIANTS.items()
    }
    assert {(c["plan"], c["cond"]) for c in COMMITTED["cases"]} == {
        (p, cond) for p in precision.PLANS for cond in precision.CONDITIONS
    }
    held = precision.within_bound(COMMITTED["cases"], plan)
    default = precision.DEFAULT[plan]
    assert held["all float32"]
    assert held[default]
    assert held[f"{default} cut"]
    assert not held["all tf32"]
    assert not held["all tf32 cut"]


def test_what_does_not_learn_is_beyond_every_bound():
    variants = {"good": {"ratio": 1.05}, "bad": {"ratio": 1.11}, "lost": {"ratio": None}}
    records = [{"plan": "gram", "cond": 1e2, "variants": variants}]
    assert precision.worst_ratios(records, "gram")["lost"] == {1e2: math.inf}
    assert precision.within_bound(records, "gram") == {"good": True, "bad": False, "lost": False}
    assert precision.worst_ratios(records, "direct") == {}
