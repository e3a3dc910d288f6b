"""Bars over groups of cases and over two methods' overheads."""

from __future__ import annotations

import pytest
from test_bench import method, statuses, synthetic

from bench import bars

STRUCTURED = "K >= 3 stride 1: mean against unfold >= 4.5"
WHOLE = "whole registry: mean against any rival >= 1"
OVERHEAD = "resnet18 32x32 b128: overhead against published <= 0.5"


def verdict(result: dict, text: str) -> bars.Verdict:
    return next(v for v in bars.evaluate(result) if v.bar.text == text)


def test_means_over_the_registry():
    result = synthetic(speedup=8)
    assert verdict(result, STRUCTURED).figure == pytest.approx(8)
    for record in result["kernels"]:  # every rival as fast as unfold at 0.9x, self_wgrad slower
        record["methods"]["unfold"] = method(0.009)
    whole = verdict(result, WHOLE)
    assert whole.figure == pytest.approx(0.9)
    assert (whole.status, whole.goal_met) == (bars.MISSED, False)
    assert statuses(result)[STRUCTURED] == bars.MISSED


def test_means_need_the_whole_registry_and_a_right_result():
    part = synthetic()
    part["settings"]["whole_registry"] = False
    assert statuses(part)[STRUCTURED] == statuses(part)[WHOLE] == bars.NOT_MEASURED
    wrong = synthetic()
    wrong["kernels"][-1]["methods"]["dbp"] = {"status": "wrong", "reason": "error 1"}
    assert statuses(wrong)[WHOLE] == bars.MISSED
    assert statuses(wrong)[STRUCTURED] == bars.MET  # a linear layer is not in that group


def test_overhead_is_the_extra_time_over_the_published_one():
    result = synthetic(slowdown=1.4)  # bp 0.2, published 0.6
    got = verdict(result, OVERHEAD)
    assert (got.status, got.figure) == (bars.MET, pytest.approx(0.2))
    assert statuses(synthetic(slowdown=2.2))[OVERHEAD] == bars.MISSED
    result["step"][1]["methods"]["published"] = method(0.19)
    got = verdict(result, OVERHEAD)
    assert (got.status, got.why) == (bars.NOT_MEASURED, "published takes no more than bp")
    del result["step"][1]["methods"]["published"]
    assert statuses(result)[OVERHEAD] == bars.NOT_MEASURED


def test_step_bars_hold_at_ten_percent():
    result = synthetic()
    for record in result["step"]:
        record["sample"] = 1.0
    assert statuses(result)[OVERHEAD] == bars.NOT_MEASURED
    assert verdict(result, OVERHEAD).why == "holds at sample 0.1, not 1"
