"""The benchmark harness: registry, rivals, timing, memory, bars, report and command line."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import (
    bars,
    calibrate,
    check,
    cli,
    kernels,
    memory,
    registry,
    regret,
    report,
    rivals,
    steps,
    timing,
)
from bench.published import PublishedConv2d, publish_model, publish_update
from bench.rivals import GPU_RIVALS, RIVALS, Rival, rivals_on
from dbp_kernels import calibration
from dbp_kernels.planner import Choice
from experiments.models import ConvNet, resnet18, resnet34, resnet50

# --- registry -----------------------------------------------------------------------------------


def test_names_are_unique_and_the_named_cases_exist():
    names = [case.name for case in registry.all_cases()]
    assert len(names) == len(set(names))
    required = """3x3 64@56 b32|3x3 128@28 b32|3x3 256@14 b32|3x3 512@7 b32|5x5 64@27 b16|
        7x7 s2 3@224 b32|11x11 s4 p2 3@224 b32|1x1 64@56 b32|1x1 s2 64@56 b32|linear 512 b32"""
    assert {name.strip() for name in required.split("|")} <= set(names)
    kernels_seen = {case.kernel[0] for case in registry.all_cases() if case.kernel}
    assert {1, 3, 5, 7, 11} <= kernels_seen


def test_every_bar_names_a_registry_case_or_a_network():
    names = {case.name for case in registry.all_cases()} | {"*"}
    names |= {f"{case.name} b{case.batch}" for case in steps.STEP_CASES} | set(regret.QUESTIONS)
    assert {bar.case for bar in bars.BARS} <= names


@pytest.mark.parametrize(
    ("build", "size", "batch"),
    [
        (resnet18, 224, 32),
        (resnet34, 224, 32),
        (resnet50, 224, 32),
        (lambda: resnet18(10, stem="cifar"), 32, 128),
        (lambda: ConvNet(3, (64, 64, 128)), 32, 128),
    ],
    ids=["resnet18", "resnet34", "resnet50", "cifar-resnet18", "cifar-convnet"],
)
def test_registry_has_every_layer_of_the_networks(build, size, batch):
    seen: dict[tuple, None] = {}

    def hook(layer: nn.Module, inputs: tuple) -> None:
        (x,) = inputs
        if isinstance(layer, nn.Linear):
            seen[(tuple(x.shape), ())] = None
        else:
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            seen[(tuple(x.shape), *window, layer.groups)] = None

    with torch.device("meta"):
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(hook)
        model(torch.empty(batch, 3, size, size))
    have = set()
    for case in registry.all_cases():
        window = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
        have.add((case.input_shape, ()) if case.is_linear else (case.input_shape, *window))
    assert len(seen) > 3
    assert set(seen) <= have


def test_sizes_agree_with_torch():
    for case in registry.all_cases():
        if case.is_linear:
            assert (case.n, case.D) == case.input_shape
            continue
        x = torch.empty(1, case.C, case.H, case.W, device="meta")
        z = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
        assert z.shape[1] == case.groups * case.D
        assert z.shape[2] * case.N == case.n


def test_select_filters_renames_and_merges():
    assert [c.name for c in registry.select("^3x3 64@56")] == ["3x3 64@56 b32"]
    assert all("resnet50" in c.tags for c in registry.select("resnet50"))
    merged = registry.select("5x5", batch=2)
    assert [(c.name, c.N) for c in merged] == [("5x5 64@27 b2", 2)]
    with pytest.raises(ValueError, match="regular expression"):
        registry.select("(")
    with pytest.raises(ValueError, match="batch"):
        registry.with_batch(merged[0], 0)


# --- rivals -------------------------------------------------------------------------------------

SMALL = [
    registry.conv(2, 3, 7, 3),
    registry.conv(2, 4, (6, 9), (3, 2), padding=(1, 1)),
    registry.conv(3, 4, (9, 6), (2, 4), padding=(2, 0), groups=2),
    registry.conv(2, 2, (8, 9), (5, 3), padding=(4, 3)),  # more padding than the customary half
    registry.conv(2, 2, (4, 5), 3, padding=3),  # more padding than the kernel reaches
    registry.conv(2, 3, (11, 9), (3, 3), dilation=(2, 1), padding=(2, 1)),
    registry.conv(2, 3, (9, 8), (1, 3)),
    registry.conv(2, 3, (9, 8), (3, 1), padding=0),
    registry.conv(2, 5, 6, 1),
    registry.conv(2, 5, 7, 1, stride=2),
    registry.conv(2, 4, 6, 1, groups=2),
    registry.conv(1, 3, 19, 7, stride=2),
    registry.conv(2, 3, 3, 4, padding=2),
    registry.linear(9, 5),
]


def definition(x: torch.Tensor, case: registry.Case) -> torch.Tensor:
    """S in float64, position by position."""
    x = x.double()
    if case.is_linear:
        return torch.einsum("ni,nj->ij", x, x)[None] / case.N
    x = F.pad(x, (case.padding[1], case.padding[1], case.padding[0], case.padding[0]))
    total = torch.zeros(case.groups, case.D, case.D, dtype=torch.float64)
    (sh, sw), (dh, dw), (kh, kw) = case.stride, case.dilation, case.kernel
    oh, ow = case.output_size
    for i in range(oh):
        for j in range(ow):
            rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
            columns = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
            z = x[:, :, rows, columns].reshape(case.N, case.groups, case.D)
            total += torch.einsum("ngd,nge->gde", z, z)
    return total / case.n


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("rival", [*RIVALS, *GPU_RIVALS])
def test_rival_equals_the_definition(rival, case):
    method = {**RIVALS, **GPU_RIVALS}[rival]
    if method.why_not(case):
        pytest.skip(method.why_not(case))
    x = torch.randn(case.input_shape, dtype=torch.float64)
    exact = definition(x, case)
    assert check.error(method.compute(x, case), exact) < 1e-13
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        low = x.to(dtype)
        result = method.compute(low, case)
        assert result.dtype == torch.float32
        loose = dtype == torch.bfloat16 and rival == "self_wgrad"  # sums in bfloat16 itself
        assert check.error(result, definition(low, case)) < (3e-2 if loose else limit)


def test_rivals_by_device():
    assert set(rivals_on(torch.device("cpu"))) == set(RIVALS)
    assert set(rivals_on(torch.device("cuda"))) == {*RIVALS, *GPU_RIVALS}


def test_padded_gemm_covers_the_cases_of_the_gpu_bars():
    why_not = GPU_RIVALS["padded_gemm"].why_not
    for case in registry.all_cases():
        wide = case.kernel not in ((), (1, 1))
        plain = wide and case.stride == (1, 1) and case.groups == 1
        assert (not why_not(case)) == plain


def test_self_wgrad_covers_what_it_should():
    why_not = RIVALS["self_wgrad"].why_not
    refused = {case.name for case in registry.all_cases() if why_not(case)}
    for case in registry.all_cases():
        one = case.kernel == (1, 1)
        plain = case.stride == (1, 1) and case.kernel
        assert (case.name in refused) == (not (one or plain))


def test_oracle_is_the_definition_also_in_chunks(monkeypatch):
    monkeypatch.setattr(check, "_CHUNK_BYTES", 1)
    for case in SMALL:
        x = torch.randn(case.input_shape)
        assert check.error(check.oracle(x, case), definition(x, case)) < 1e-13


def test_error_sees_shapes_and_non_finite_entries():
    exact = torch.eye(3, dtype=torch.float64)[None]
    assert check.error(exact, exact) == 0
    assert check.error(exact[0], exact) == float("inf")
    assert check.error(exact.clone().fill_(float("nan")), exact) == float("inf")


# --- timing and memory --------------------------------------------------------------------------


def test_interleaved_times_show_the_ratio_of_sleeps():
    order: list[str] = []

    def sleeper(name: str, seconds: float):
        return lambda: (order.append(name), time.sleep(seconds))

    times = timing.time_interleaved(
        {"short": sleeper("short", 0.005), "long": sleeper("long", 0.015)}, 5, warmup=1
    )
    assert 1.5 < times["long"].median / times["short"].median < 6
    assert times["long"].samples == 5
    assert times["long"].min <= times["long"].q1 <= times["long"].median
    assert times["long"].median <= times["long"].q3 <= times["long"].max
    assert order[-4:] == ["long", "short", "short", "long"]  # rounds alternate


def test_short_calls_are_repeated_within_a_sample():
    times = timing.time_interleaved({"nothing": lambda: None}, 2, warmup=1)
    assert times["nothing"].calls > 10


def test_timing_rejects_bad_counts():
    with pytest.raises(ValueError, match="pairs"):
        timing.time_interleaved({}, 0)
    with pytest.raises(ValueError, match="seconds"):
        timing.spread([])


def test_extra_bytes_is_the_peak_beyond_the_result():
    def call() -> torch.Tensor:
        result = torch.zeros(250_000)
        temporary = torch.zeros(500_000)
        del temporary
        torch.zeros(100_000)
        return result

    assert 2_000_000 <= memory.extra_bytes(call) < 2_010_000
    assert memory.extra_bytes(lambda: torch.zeros(1000)) == 0


# --- kernels suite ------------------------------------------------------------------------------

TINY = registry.conv(2, 2, 5, 3)
FAST = kernels.Settings(pairs=2, warmup=1)


def always(label: str, compute) -> Rival:
    return Rival(label, compute, lambda case: "")


def test_a_wrong_method_gets_no_number():
    def wrong(x, case):
        return rivals.unfold_matmul(x, case) * 1.001

    def raising(x, case):
        raise RuntimeError("no")

    methods = {
        "dbp": always("wrong", wrong),
        "unfold": RIVALS["unfold"],
        "raising": always("raising", raising),
        "absent": Rival("absent", raising, lambda case: "does not apply"),
    }
    record = kernels.run_case(TINY, FAST, methods)
    statuses = {name: method["status"] for name, method in record["methods"].items()}
    assert statuses == {"dbp": "wrong", "unfold": "ok", "raising": "failed", "absent": "n/a"}
    for name in ("dbp", "raising", "absent"):
        assert {"seconds", "extra_bytes"}.isdisjoint(record["methods"][name])
        assert record["methods"][name]["reason"]
    assert bars.speedup(record, "unfold") is None


def test_a_wrong_plain_method_does_not_widen_the_bound():
    def wrong(x, case):
        return rivals.unfold_matmul(x, case) * 1.1

    methods = {"dbp": always("wrong", wrong), "unfold": always("wrong", wrong)}
    record = kernels.run_case(TINY, FAST, methods)
    assert [m["status"] for m in record["methods"].values()] == ["wrong", "wrong"]


# --- published algorithm ------------------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, dilation=2),
        nn.Flatten(),
        nn.LazyLinear(6),
    )


def test_published_update_is_the_rule():
    layer = PublishedConv2d(nn.Conv2d(2, 4, 3, padding=1))
    layer.R += 0.1 * torch.randn_like(layer.R)
    x = torch.randn(3, 2, 6, 5)
    before = layer.R.double()
    layer(x)
    loss = layer.update(lr=0.01, kappa=0.3, sample=1.0)
    z = F.unfold(x.double(), 3, padding=1).transpose(1, 2).reshape(-1, 18)
    y = z @ before.t()
    c = y.t() @ y / len(y)
    off, v = c - c.diag().diag(), c.diag() - 1
    expected = before - 0.01 * (0.7 * off + 0.3 * v.diag()) @ before
    torch.testing.assert_close(layer.R.double(), expected, atol=1e-5, rtol=0)
    expected_loss = (0.7 * off.square().sum() + 0.3 * v.square().sum()) / 18**2
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-5, rtol=1e-4)
    assert not layer.R.requires_grad
    with pytest.raises(RuntimeError, match="forward pass"):
        layer.update(lr=0.01, kappa=0.3, sample=1.0)


def test_published_and_ours_train_the_same_network():
    dbp = pytest.importorskip("dbp_kernels")
    plain = small_net()
    x, labels = torch.randn(8, 3, 9, 12), torch.randint(6, (8,))
    plain(x)  # sets the lazy layer's size
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    dbp.decorrelate_model(ours)
    update = dbp.DecorUpdate(ours, lr=0.02, kappa=0.5, sample=1.0)
    publish_model(theirs)
    for _ in range(3):
        losses = []
        for model in (ours, theirs):
            loss = F.cross_entropy(model(x), labels)
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        update.step()
        publish_update(theirs, lr=0.02, kappa=0.5, sample=1.0)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    r_ours = {k: v for k, v in ours.state_dict().items() if k.endswith("R")}
    r_theirs = {k: v for k, v in theirs.state_dict().items() if k.endswith("R")}
    assert set(r_ours) == set(r_theirs)
    assert len(r_ours) == 3
    for name, value in r_ours.items():
        assert (value - torch.eye(len(value))).abs().max() > 1e-3
        torch.testing.assert_close(value, r_theirs[name], atol=1e-5, rtol=1e-4)


def test_publish_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="groups"):
        publish_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


# --- bars and report ----------------------------------------------------------------------------


def seconds(median: float, samples: int = 9) -> dict:
    return timing.Spread(median, median, median, median, median, samples).as_dict()


def method(median: float, extra: int = 0, samples: int = 9) -> dict:
    return {"status": "ok", "seconds": seconds(median, samples), "extra_bytes": extra}


def synthetic(speedup: float = 7.0, slowdown: float = 1.05, extra: int = 100) -> dict:
    cases = []
    for case in registry.all_cases():
        methods = {
            "dbp": method(0.01, extra),
            "unfold": method(0.01 * speedup),
            "self_wgrad": {"status": "n/a", "reason": "stride above 1"},
        }
        if not case.is_linear and case.stride == (1, 1):
            methods["self_wgrad"] = method(0.02)
        record = {"name": case.name, "n": case.n, "D": case.D, "groups": case.groups}
        record.update(kernel=list(case.kernel), stride=list(case.stride), methods=methods)
        record["input_elements"] = case.input_elements
        cases.append(record)
    step = {"bp": method(0.2, samples=25), "dbp": method(0.2 * slowdown, samples=25)}
    step["published"] = method(0.6, samples=25)
    return {
        "command": "python -m bench --suite all",
        "machine": {"commit": "0" * 40, "dirty": False, "cpu": "c", "threads": 2, "torch": "2"},
        "settings": {"device": "cpu", "dtype": "float32", "whole_registry": True},
        "kernels": cases,
        "step": [{"name": "convnet 32x32 b128", "sample": 0.1, "methods": step}],
        "regret": [predicted(question, 0.0) for question in regret.QUESTIONS for _ in range(10)],
    }


def predicted(question: str, by: float, samples: int = 9) -> dict:
    """The record of a choice whose regret is ``by``."""
    methods = {"chosen": method(0.01 * (1 + by), samples=samples), "other": method(0.01)}
    record = {"name": "case", "question": question, "n": 1, "D": 1, "methods": methods}
    return {**record, "predicted": "chosen", "best": "other", "regret": by}


def statuses(result: dict) -> dict[str, str]:
    return {v.bar.text: v.status for v in bars.evaluate(result)}


def test_bars_met():
    verdicts = bars.evaluate(synthetic(speedup=11))
    assert {v.status for v in verdicts} == {bars.MET}
    assert all(v.goal_met for v in verdicts if v.bar.goal is not None)
    assert verdicts[0].figure == pytest.approx(11)


def test_bars_missed_by_a_slow_method():
    got = statuses(synthetic(speedup=3.0, slowdown=1.3))
    assert got["3x3 64@56 b32: speedup against unfold >= 4"] == bars.MISSED
    assert got["3x3 512@7 b32: speedup against unfold >= 2.5"] == bars.MET
    assert got["convnet 32x32 b128: slowdown against bp <= 1.25"] == bars.MISSED


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
        "step": [{"name": "resnet50 224x224 b256", "methods": step}],
    }


def test_gpu_bars():
    verdicts = bars.evaluate(gpu_result(ours=1.0, best=1.6))
    assert [v.status for v in verdicts] == [bars.MET] * 4
    assert [v.figure for v in verdicts] == pytest.approx([10, 1.6, 10, 1.0])
    assert all(v.goal_met for v in verdicts if v.bar.goal is not None)
    slow = bars.evaluate(gpu_result(ours=4.0, best=3.0, slowdown=1.3))
    assert [v.status for v in slow] == [bars.MISSED, bars.MISSED, bars.MET, bars.MISSED]


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


GRAM_BAR = "planner, gram: cases within 10% of the best >= 90%"


def test_nine_good_predictions_in_ten_meet_the_bar():
    result = synthetic()
    result["regret"][0] = predicted("gram", 3.0)
    verdict = next(v for v in bars.evaluate(result) if v.bar.text == GRAM_BAR)
    assert (verdict.status, verdict.figure) == (bars.MET, 0.9)
    assert verdict.where == "300% slower at worst, case"
    result["regret"][1] = predicted("gram", 0.11)
    assert statuses(result)[GRAM_BAR] == bars.MISSED
    table = report.regret_table(result["regret"])
    assert "in 8 of 10 cases (80%)" in table
    assert "in 10 of 10 cases (100%)" in table  # the updates


def test_a_case_without_a_choice_is_no_good_prediction():
    result = synthetic()
    result["regret"] = [predicted("gram", 3.0)] + [predicted("gram", 0.0) for _ in range(8)]
    alone = predicted("gram", 0.0)
    del alone["regret"], alone["best"], alone["methods"]["other"]
    result["regret"] += [alone] * 20
    assert statuses(result)[GRAM_BAR] == bars.MISSED  # 8 of 9
    assert "20 further cases without a choice" in report.regret_table(result["regret"])


def test_a_wrong_or_hasty_prediction_does_not_count():
    result = synthetic()
    result["regret"][0] = predicted("gram", 0.0, samples=6)
    assert statuses(result)[GRAM_BAR] == bars.NOT_MEASURED
    result["regret"][0]["methods"]["chosen"] = {"status": "wrong", "reason": "differs by 1"}
    assert statuses(result)[GRAM_BAR] == bars.MISSED


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
    assert statuses(without)["convnet 32x32 b128: slowdown against bp <= 1.25"] == (
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
    means = report.geometric_means(synthetic(speedup=8.0)["kernels"])
    assert means["unfold, all cases"] == (pytest.approx(8), len(registry.all_cases()))
    assert means["self_wgrad, K >= 3 stride 1"][0] == pytest.approx(2)
    assert means["best rival, K >= 3 stride 1"][0] == pytest.approx(2)


# --- command line -------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_quick_run_end_to_end(tmp_path, capsys):
    target = tmp_path / "run.json"
    options = ("--suite", "all", "--quick", "--filter", "^3x3 3@32|convnet 32", "--batch", 2)
    assert run(*options, "--threads", 1, "--save", target) == 0
    printed = capsys.readouterr().out
    result = json.loads(target.read_text())
    assert [record["name"] for record in result["kernels"]] == ["3x3 3@32 b2"]
    assert [record["name"] for record in result["step"]] == ["convnet 32x32 b2"]
    for record in result["kernels"] + result["step"]:
        for name, measured in record["methods"].items():
            assert measured["status"] == "ok", (name, measured)
            assert measured["seconds"]["samples"] == cli.QUICK_PAIRS
            assert measured["seconds"]["median"] > 0
    assert set(result["step"][0]["methods"]) == {"bp", "dbp", "published"}
    assert result["complete"]
    assert result["machine"]["threads"] == 1
    assert result["command"].startswith("python -m bench --suite all")
    assert len(result["bars"]) == len(bars.BARS)
    assert {"3x3 3@32 b2", "convnet 32x32 b2"} <= set(printed.replace("|", "  ").split("  ")) | {
        cell.strip() for cell in printed.split("|")
    }

    assert run("report", target) == 0
    again = capsys.readouterr().out
    assert report.text_report(result) in printed
    assert report.text_report(result) in again
    assert target.with_suffix(".png").stat().st_size > 1000


# --- the planner's regret and calibration -------------------------------------------------------


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


def test_a_quick_calibration_is_a_calibration(tmp_path, capsys):
    target = tmp_path / "cpu.json"
    assert run("calibrate", "--quick", "--threads", 1, "--save", target) == 0
    assert f"saved {target}" in capsys.readouterr().out
    read = calibration.read(target, "it")
    assert (read.type, read.threads, read.measured) == ("cpu", 1, True)
    assert read.device == calibration.cpu_name()
    assert read.machine.product_rate(64) > 0
    origin = json.loads(target.read_text())["origin"]
    assert origin["command"].startswith("python -m bench calibrate --quick --threads 1")
    before = target.read_text()
    assert run("calibrate", "--quick", "--save", target) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert target.read_text() == before
    assert run("calibrate", "--quick", "--threads", 1, "--save", target, "--overwrite") == 0
    assert calibration.read(target, "it").machine != read.machine


def test_of_several_passes_the_best_figures_count():
    one = {"product": [[1, 2.0], [3, 4.0]], "gbytes": 5.0, "call": 2.0, "pack": [1.0, 2.0, 3.0]}
    two = {"product": [[1, 3.0], [3, 1.0]], "gbytes": 6.0, "call": 1.0, "pack": [2.0, 1.0, 3.0]}
    best = {"product": [[1, 3.0], [3, 4.0]], "gbytes": 6.0, "call": 1.0, "pack": [1.0, 1.0, 3.0]}
    assert calibrate._better(one, two) == best


def test_a_calibration_is_named_after_its_device():
    content = {"device": "AMD EPYC(tm) 1.2", "type": "cpu", "threads": 4}
    assert calibrate.default_path(content).name == "amd-epyc-tm-1-2-4-threads.json"
    content = {"device": "NVIDIA H200", "type": "cuda", "threads": 1}
    assert calibrate.default_path(content).name == "nvidia-h200.json"


def test_cpu_time_is_not_spent_asleep():
    with timing.cpu_time():
        asleep = timing.time_once(lambda: time.sleep(0.1), torch.device("cpu"))
    assert asleep < 0.05
    assert timing.time_once(lambda: time.sleep(0.1), torch.device("cpu")) > 0.09


def test_an_existing_result_is_never_overwritten(tmp_path, capsys):
    target = tmp_path / "run.json"
    target.write_text("mine")
    assert run("--quick", "--filter", "^3x3 3@32", "--save", target) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert target.read_text() == "mine"
    with pytest.raises(FileExistsError):
        cli.save({"a": 1}, target)


def test_default_result_path_names_device_and_commit():
    options = cli.parser().parse_args(["--save"])
    assert cli._target(options).parent.name == "results"
    assert cli._target(options).name.startswith("cpu-")
    assert cli._target(cli.parser().parse_args([])) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--filter", "nothing of the kind"],
        ["--filter", "("],
        ["--sample", "0"],
        ["--suite", "step", "--dtype", "float64"],
        ["--cpu-time"],
        ["calibrate", "--cpu-time", "--threads", "2"],
        ["report", "no-such-file.json"],
    ],
)
def test_bad_arguments_end_with_one_sentence(arguments, capsys):
    assert run(*arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--device", "nonsense"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert arguments[1] in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    done = kernels.run_case(TINY, FAST, {"dbp": RIVALS["unfold"], "unfold": RIVALS["unfold"]})
    calls = iter([done])

    def stop(*arguments, **options):
        for record in calls:
            return record
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_case", stop)
    target = tmp_path / "part.json"
    assert run("--filter", "^3x3 64@", "--save", target) == 1
    result = json.loads(target.read_text())
    assert not result["complete"]
    assert len(result["kernels"]) == 1
    assert "INCOMPLETE" in report.text_report(result)
