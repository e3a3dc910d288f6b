"""The planner's regret, its bars, and the calibrations that it reckons with."""

from __future__ import annotations

import time

import pytest
import torch
from bench_results import predicted, statuses, synthetic

from bench import cli
from bench.core import bars, registry, report
from bench.suites import kernels, regret
from bench.suites.regret import regret_table
from dbp_kernels.planning.choice import Choice

FAST = kernels.Settings(pairs=2, warmup=1)
GRAM_BAR = "planner, gram: cases within 10% of the best >= 90%"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_nine_good_predictions_in_ten_meet_the_bar():
    result = synthetic()
    result["regret"][0] = predicted("gram", 3.0)
    verdict = next(v for v in bars.evaluate(result) if v.bar.text == GRAM_BAR)
    assert (verdict.status, verdict.figure) == (bars.MET, 0.9)
    assert verdict.where == "300% slower at worst, case"
    result["regret"][1] = predicted("gram", 0.11)
    assert statuses(result)[GRAM_BAR] == bars.MISSED
    table = regret_table(result["regret"])
    assert "in 8 of 10 cases (80%)" in table
    assert "in 10 of 10 cases (100%)" in table  # the updates


def test_a_case_without_a_choice_is_no_good_prediction():
    result = synthetic()
    result["regret"] = [predicted("gram", 3.0)] + [predicted("gram", 0.0) for _ in range(8)]
    alone = predicted("gram", 0.0)
    del alone["regret"], alone["best"], alone["methods"]["other"]
    result["regret"] += [alone] * 20
    assert statuses(result)[GRAM_BAR] == bars.MISSED  # 8 of 9
    assert "20 further cases without a choice" in regret_table(result["regret"])


def test_a_wrong_or_hasty_prediction_does_not_count():
    result = synthetic()
    result["regret"][0] = predicted("gram", 0.0, samples=6)
    assert statuses(result)[GRAM_BAR] == bars.NOT_MEASURED
    result["regret"][0]["methods"]["chosen"] = {"status": "wrong", "reason": "differs by 1"}
    assert statuses(result)[GRAM_BAR] == bars.MISSED


@pytest.mark.parametrize("question", regret.QUESTIONS)
def test_regret_records(question):
    case = registry.conv(4, 4, 9, 3)
    record = regret.run_regret(question, case, kernels.Settings(pairs=3, warmup=1))
    assert (record["name"], record["question"]) == (case.name, question)
    expected = {"gram": {"shift", "unfold", "self_wgrad"}, "update": {"direct"}}[question]
    assert expected <= set(record["methods"])
    timed = {n: m["seconds"]["median"] for n, m in record["methods"].items() if "seconds" in m}
    assert all(m["status"] == "ok" and m["once"] > 0 for m in record["methods"].values())
    assert record["predicted"] in timed
    assert record["best"] == min(timed, key=timed.get)
    expected = timed[record["predicted"]] / min(timed.values()) - 1
    assert record["regret"] == pytest.approx(expected, rel=0.01, abs=1e-3)


def test_a_case_without_a_choice_is_not_timed():
    record = regret.run_regret("gram", registry.linear(9, 5), FAST)
    assert list(record["methods"]) == ["unfold"]
    assert "regret" not in record


def fake_candidates(seconds: dict[str, float], wrong: str = ""):
    """Candidates by what an image takes, in the order of their predictions."""

    def candidates(question, case, x):
        def run(choice, images=None):
            time.sleep(seconds[choice.name] * (len(x) if images is None else images))
            return torch.full((1, 1, 1), 2.0 if choice.name == wrong else 1.0)

        return tuple(Choice(name, 0.0, 1.0) for name in seconds), run

    return candidates


def test_a_slow_candidate_is_out_by_what_a_part_of_the_images_takes(monkeypatch):
    seconds = {"predicted": 0.004, "faster": 0.001, "slow": 0.03, "slowest": 1.0}
    monkeypatch.setattr(regret, "_candidates", fake_candidates(seconds))
    begin = time.perf_counter()
    record = regret.run_regret("gram", registry.conv(64, 4, 9, 3), FAST)
    assert time.perf_counter() - begin < 30  # all images of the slowest: 64 seconds
    assert (record["predicted"], record["best"]) == ("predicted", "faster")
    assert 1 < record["regret"] < 6
    assert record["methods"]["slow"]["images"] == 8
    assert record["methods"]["slowest"]["images"] == 1
    assert "seconds" not in record["methods"]["slowest"]


def test_the_predicted_best_is_timed_however_slow(monkeypatch):
    monkeypatch.setattr(regret, "_candidates", fake_candidates({"slow": 0.03, "fast": 0.002}))
    record = regret.run_regret("gram", registry.conv(2, 4, 9, 3), FAST)
    assert record["regret"] > 2


def test_a_candidate_with_another_result_gets_no_number(monkeypatch):
    seconds = {"predicted": 0.001, "other": 0.0001}
    monkeypatch.setattr(regret, "_candidates", fake_candidates(seconds, wrong="other"))
    record = regret.run_regret("gram", registry.conv(2, 4, 9, 3), FAST)
    assert record["methods"]["other"]["status"] == "wrong"
    assert record["best"] == "predicted"
    assert "other wrong: differs by" in report.problems([record])


def test_updates_are_asked_about_the_sampled_images():
    cases = list(regret.regret_cases([registry.conv(n, 4, 9, 3) for n in (4, 5, 30)], 0.1))
    assert [(q, c.N) for q, c in cases] == [
        ("gram", 4),
        ("gram", 5),
        ("gram", 30),
        ("update", 1),  # once
        ("update", 3),
    ]
