"""The bars that results are held to, and geometric means."""

from __future__ import annotations

import pytest
from bench_results import method, statuses, synthetic

from bench.core import bars, registry
from bench.suites import kernels

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


def test_replayed_times_count_where_both_have_them():
    record = {"methods": {"dbp": method(1.0), "unfold": method(2.0)}}
    assert bars.speedup(record, "unfold") == 2.0
    record["methods"]["dbp"]["replay"] = {"median": 0.5}
    assert bars.speedup(record, "unfold") == 2.0
    record["methods"]["unfold"]["replay"] = {"median": 1.5}
    assert bars.speedup(record, "unfold") == 3.0
    assert bars._fastest_rival(record["methods"], but="") == "unfold"


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


def test_passes_are_held_to_a_bar_of_their_own():
    result = synthetic()
    text = "resnet18 32x32 b128, forward and backward: slowdown against bp <= 1.02"
    result["passes"][1]["methods"]["dbp"] = method(0.105, samples=25)
    assert statuses(result)[text] == bars.MISSED
    result["passes"][1]["methods"]["dbp"] = method(0.101, samples=8)
    assert verdict(result, text).why == "8 pairs, 9 needed"
    result["passes"][1]["sample"] = 1.0
    assert verdict(result, text).why == "holds at sample 0.1, not 1"


def test_bars_met():
    verdicts = bars.evaluate(synthetic(speedup=11))
    assert {v.status for v in verdicts} == {bars.MET}
    assert all(v.goal_met for v in verdicts if v.bar.goal is not None)
    assert verdicts[0].figure == pytest.approx(11)


def test_bars_missed_by_a_slow_method():
    got = statuses(synthetic(speedup=3.0, slowdown=1.3))
    assert got["3x3 64@56 b32: speedup against unfold >= 4"] == bars.MISSED
    assert got["3x3 512@7 b32: speedup against unfold >= 2.5"] == bars.MET
    assert got["convnet 32x32 b128: slowdown against bp <= 1.2"] == bars.MISSED


def gpu_result(ours: float, best: float, slowdown: float = 1.0) -> dict:
    """Ours takes ``ours`` seconds, unfold 10, the other rivals ``best`` and more."""
    cases = []
    for case in (c for n in (256, 26) for c in registry.select("resnet", n)):
        methods = {"dbp": method(ours), "unfold": method(10.0), "self_wgrad": method(best)}
        methods["padded_gemm"] = method(2 * best) if case.D % 2 else {"status": "n/a"}
        record = {"name": case.name, "n": case.n, "D": case.D, "groups": case.groups}
        record.update(kernel=list(case.kernel), stride=list(case.stride), methods=methods)
        record.update(tags=list(case.tags), input_elements=case.input_elements)
        cases.append(record)
    step = {"bp": method(0.2), "dbp": method(0.2 * slowdown)}
    return {
        "settings": {"device": "cuda", "dtype": "bfloat16", "whole_registry": False},
        "kernels": cases,
        "step": [{"name": f"{n} 224x224 b256", "methods": step} for n in ("resnet50", "resnet18")],
    }


def test_gpu_bars():
    verdicts = bars.evaluate(gpu_result(ours=1.0, best=1.6))
    assert [v.status for v in verdicts] == [bars.MET] * 5
    assert [v.figure for v in verdicts] == pytest.approx([10, 1.6, 10, 1.0, 1.0])
    assert all(v.goal_met for v in verdicts if v.bar.goal is not None)
    part = gpu_result(ours=1.0, best=1.6)
    part["kernels"] = [
        r for r in part["kernels"] if "1x1" in r["name"] or r["name"].endswith("b26")
    ]
    unfold, best, pointwise, *_ = bars.evaluate(part)
    assert [v.status for v in (unfold, best, pointwise)] == [*[bars.NOT_MEASURED] * 2, bars.MET]
    assert (unfold.figure, best.figure) == pytest.approx((10, 1.6))
    assert unfold.why == "4 of its cases not run"
    slow = bars.evaluate(gpu_result(ours=4.0, best=3.0, slowdown=1.3))
    assert [v.status for v in slow] == [*[bars.MISSED] * 2, bars.MET, bars.MISSED, bars.MET]
    assert [v.goal_met for v in slow[3:]] == [False, False]


def test_gpu_bars_count_every_case_with_enough_patches():
    counted = [r["name"] for r in gpu_result(1, 1)["kernels"] if bars.GROUPS[FIRST_GROUP](r)]
    assert "3x3 64@56 b256" in counted
    assert "3x3 512@7 b256" in counted
    assert "3x3 512@7 b26" not in counted  # n < D
    assert not any(name.startswith(("1x1", "7x7", "3x3 s2")) for name in counted)


FIRST_GROUP = next(iter(bars.GROUPS))


def test_a_wrong_result_of_ours_misses_a_gpu_bar():
    result = gpu_result(1.0, 2.0)
    wrong = next(r for r in result["kernels"] if bars.GROUPS[FIRST_GROUP](r))
    wrong["methods"]["dbp"] = {"status": "wrong", "reason": "error 1"}
    assert [v.status for v in bars.evaluate(result)][:2] == [bars.MISSED, bars.MISSED]


def test_the_worst_case_decides():
    result = synthetic()
    result["kernels"][-1]["methods"]["dbp"] = method(0.08)
    result["kernels"][4]["methods"]["dbp"]["extra_bytes"] = 10**12
    verdicts = {v.bar.text: v for v in bars.evaluate(result)}
    slowest = verdicts["every case: speedup against unfold >= 0.95"]
    assert (slowest.status, slowest.where) == (bars.MISSED, result["kernels"][-1]["name"])
    heaviest = verdicts["every case: memory against 3 inputs + D^2 <= 1"]
    assert (heaviest.status, heaviest.where) == (bars.MISSED, result["kernels"][4]["name"])


def test_a_wrong_method_misses_its_bars():
    result = synthetic()
    result["kernels"][1]["methods"]["dbp"] = {"status": "wrong", "reason": "error 1"}
    got = statuses(result)
    assert got["3x3 64@56 b32: speedup against unfold >= 4"] == bars.MISSED
    assert got["every case: speedup against unfold >= 0.95"] == bars.MISSED


def test_conditions_that_do_not_hold_leave_bars_unmeasured():
    few = synthetic()
    for record in few["kernels"]:
        record["methods"]["dbp"] = method(0.01, samples=3)
    assert statuses(few)["3x3 64@56 b32: speedup against unfold >= 4"] == bars.NOT_MEASURED
    without = synthetic()
    del without["step"][0]["methods"]["published"]
    assert statuses(without)["convnet 32x32 b128: slowdown against bp <= 1.2"] == (
        bars.NOT_MEASURED
    )
    part = synthetic()
    part["settings"]["whole_registry"] = False
    assert statuses(part)["every case: speedup against unfold >= 0.95"] == bars.NOT_MEASURED
    other = synthetic()
    other["settings"]["device"] = "cuda"
    assert set(statuses(other).values()) == {bars.NOT_MEASURED}


def test_memory_figure():
    result = synthetic()
    record = result["kernels"][1]
    assert bars.memory_allowance(record) == 4 * (3 * 32 * 64 * 56 * 56 + 576**2)


def test_geometric_means():
    means = kernels.geometric_means(synthetic(speedup=8.0)["kernels"])
    assert means["unfold, all cases"] == (pytest.approx(8), len(registry.all_cases()))
    assert means["self_wgrad, K >= 3 stride 1"][0] == pytest.approx(2)
    assert means["best rival, K >= 3 stride 1"][0] == pytest.approx(2)
