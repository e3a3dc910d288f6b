"""The benchmark harness: registry, rivals, timing, memory, bars, report and command line."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import cli, rivals, suites
from bench.core import bars, check, memory, registry, report, results, suite
from bench.rivals import GPU_RIVALS, RIVALS, Rival, dense, rivals_on
from bench.rivals.published import PublishedConv2d, publish_model, publish_update
from bench.suites import kernels, regret, steps
from dbp_kernels.backends.triton import runtime
from dbp_kernels.tools import cases, timing
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
    names = {case.name for case in registry.all_cases()} | {"*", *bars.GROUPS}
    names |= {f"{case.name} b{case.batch}" for case in steps.STEP_CASES}
    names |= set(regret.QUESTIONS)
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
    assert cases.error(method.compute(x, case), exact) < 1e-13
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        low = x.to(dtype)
        result = method.compute(low, case)
        assert result.dtype == torch.float32
        loose = dtype == torch.bfloat16 and rival == "self_wgrad"  # sums in bfloat16 itself
        assert cases.error(result, definition(low, case)) < (3e-2 if loose else limit)


def test_rivals_by_device(monkeypatch):
    monkeypatch.setattr(rivals, "installed", lambda package: False)
    on_gpu = {*RIVALS, *GPU_RIVALS, "compiled"}
    assert set(rivals_on(torch.device("cpu"))) == set(RIVALS)
    assert set(rivals_on(torch.device("cuda"))) == on_gpu
    monkeypatch.setattr(rivals, "installed", lambda package: True)
    assert set(rivals_on(torch.device("cpu"))) == {*RIVALS, "einconv"}
    assert set(rivals_on(torch.device("cuda"))) == {*on_gpu, "einconv", "quack"}


@pytest.mark.skipif(not rivals.installed("einconv"), reason="einconv is not installed")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_einconv_equals_the_definition(case):
    method = rivals.OPTIONAL["einconv"]
    if method.why_not(case):
        pytest.skip(method.why_not(case))
    x = torch.randn(case.input_shape, dtype=torch.float64)
    assert (
        cases.error(method.compute(x, case), definition(x, case)) < 1e-7
    )  # its scale is a float32
    assert method.compute(x.bfloat16(), case).dtype == torch.float32


@pytest.mark.slow
def test_compiled_reference_equals_the_definition():
    for case in SMALL[1:3]:
        for dtype, limit in ((torch.float64, 1e-13), (torch.bfloat16, 1e-5)):
            x = torch.randn(case.input_shape, dtype=dtype)
            result = rivals.COMPILED.compute(x, case)
            assert result.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert cases.error(result, definition(x, case)) < limit


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
    monkeypatch.setattr(cases, "_CHUNK_BYTES", 1)
    for case in SMALL:
        x = torch.randn(case.input_shape)
        assert cases.error(cases.oracle(x, case), definition(x, case)) < 1e-13


def test_error_sees_shapes_and_non_finite_entries():
    exact = torch.eye(3, dtype=torch.float64)[None]
    assert cases.error(exact, exact) == 0
    assert cases.error(exact[0], exact) == float("inf")
    assert cases.error(exact.clone().fill_(float("nan")), exact) == float("inf")


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
        return dense.unfold_matmul(x, case) * 1.001

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


def test_a_method_may_say_that_an_input_is_not_for_it():
    def compute(x, case):
        raise rivals.NotApplicable("float32 is not for it")

    record = kernels.run_case(TINY, FAST, {"dbp": always("dbp", compute)})
    assert record["methods"]["dbp"] == {"status": "n/a", "reason": "float32 is not for it"}


def test_our_own_kernels_are_held_to_their_own_bound():
    def slightly_off(x, case):
        return dense.unfold_matmul(x, case) * (1 + 5e-6)

    methods = {
        "unfold": RIVALS["unfold"],
        "rival": Rival("rival", slightly_off, lambda case: ""),
        "kernel": Rival("kernel", slightly_off, lambda case: "", ours=True),
    }
    record = kernels.run_case(TINY, FAST, methods)
    assert record["methods"]["rival"]["status"] == "ok"
    assert record["methods"]["kernel"]["status"] == "wrong"


def test_the_cap_on_plain_torch_leaves_room_for_what_tensor_cores_truncate():
    on_a_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    on_a_cpu = torch.zeros(1, dtype=torch.bfloat16)
    assert check.plain_cap(on_a_cpu) < 2e-4 < check.plain_cap(on_a_gpu) <= 1e-3
    assert check.bound(True, 5e-6, on_a_gpu) == check.bound(True, 5e-6, on_a_cpu)


def test_times_of_replays_stand_beside_those_of_calls(monkeypatch):
    def captured(call, calls, device):
        if captured.seen:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.seen.append(calls)
        return lambda: time.sleep(0.001 * calls)

    captured.seen = []
    monkeypatch.setattr(timing, "captured", captured)
    settings = kernels.Settings(pairs=3, warmup=1, replay=True)
    record = kernels.run_case(TINY, settings, {k: RIVALS[k] for k in ("unfold", "self_wgrad")})
    first, second = record["methods"].values()
    assert 1e-3 <= first["replay"]["median"] < 3e-3
    assert first["replay"]["calls"] == captured.seen[0]
    assert first["replay"]["samples"] == first["seconds"]["samples"] == 3
    assert "capturing" in second["no_replay"]
    assert "replay" not in second
    assert second["seconds"]["median"] > 0


class FakeCuda:
    """torch.cuda's streams and graphs, as far as timing uses them; like torch's, a capture that fails
    never leaves its stream."""

    def __init__(self):
        self.stream_now, self.log = "default", []

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph):
        assert self.log[-1] == "synchronize"
        before, self.stream_now = self.stream_now, "capture"
        yield
        self.stream_now = before

    def replace(self, monkeypatch):
        graph = types.SimpleNamespace(replay=lambda: self.log.append("replay"))
        fakes = {
            "synchronize": lambda device=None: self.log.append("synchronize"),
            "current_stream": lambda device=None: self.stream_now,
            "stream": self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "time_once", lambda call, device, calls=1: call() or 1e-3)


def test_calls_are_captured_beside_the_default_stream_after_one_outside(monkeypatch):
    fake = FakeCuda()
    fake.replace(monkeypatch)
    good = lambda: fake.log.append(fake.stream_now)  # noqa: E731

    def bad():
        if fake.stream_now == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return good()

    times, reasons = timing.time_replayed({"bad": bad, "good": good}, 3, device="cuda")
    assert set(times) == {"good"}
    assert "not permitted" in reasons["bad"]
    assert fake.stream_now == "default"
    assert fake.log == [
        *("default", "synchronize"),
        *("default", "synchronize", "capture", "capture"),
        *["replay"] * 4,  # the first one uploads the graph
    ]


def test_replays_on_a_cpu_are_calls():
    done = []
    spreads, reasons = timing.time_replayed({"a": lambda: done.append(1)}, 2, shortest_sample=1e-9)
    assert (spreads["a"].samples, spreads["a"].calls, reasons) == (2, 1, {})
    assert len(done) == 4  # one is timed to choose the number of calls, one warms the replay up


def test_a_wrong_plain_method_does_not_widen_the_bound():
    def wrong(x, case):
        return dense.unfold_matmul(x, case) * 1.1

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
            assert measured["seconds"]["samples"] == suite.QUICK_PAIRS
            assert measured["seconds"]["median"] > 0
    assert set(result["step"][0]["methods"]) == {"bp", "dbp", "dbp layers", "published"}
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


RESULTS = sorted(results.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_reported(path, tmp_path):
    result = json.loads(path.read_text())
    text = report.text_report(result)
    choices = result.get("regret", [])  # of which the table has the worst only, and no plot
    assert (
        not choices
        or f"of {sum('regret' in r for r in choices if r['question'] == 'gram')}" in text
    )
    for record in report.judged_records({**result, "regret": []}):
        assert f"| {record.get('sweep', record['name'])}" in text
    undrawn = ("regret", "host_time", "long_run", "counters")
    drawn = any(result.get(suite) for suite in suites.SUITES if suite not in undrawn)
    assert report.plot(result, tmp_path / "plot.png") == drawn


def test_an_existing_result_is_never_overwritten(tmp_path, capsys):
    target = tmp_path / "run.json"
    target.write_text("mine")
    assert run("--quick", "--filter", "^3x3 3@32", "--save", target) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert target.read_text() == "mine"
    with pytest.raises(FileExistsError):
        results.save({"a": 1}, target)


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

    monkeypatch.setattr(kernels, "run_case", stop)
    target = tmp_path / "part.json"
    assert run("--filter", "^3x3 64@", "--save", target) == 1
    result = json.loads(target.read_text())
    assert not result["complete"]
    assert len(result["kernels"]) == 1
    assert "INCOMPLETE" in report.text_report(result)


# --- single algorithms ----------------------------------------------------------------------------


def test_a_single_algorithm_of_a_backend_is_a_method():
    names = "unfold,triton_direct,triton_shift,cuda_direct,cuda_sm90"
    methods = kernels.chosen_methods(names, FAST)
    assert ",".join(methods) == names
    assert kernels.chosen_methods(None, FAST) is None
    with pytest.raises(ValueError, match=r"cuda_sm80: expected some of dbp, .*cuda_sm90"):
        kernels.chosen_methods("dbp,cuda_sm80", FAST)

    records = kernels.run_case(TINY, FAST, methods)["methods"]
    assert "CUDA" in records["cuda_direct"]["reason"] or "built" in records["cuda_direct"]["reason"]
    assert "float32" in records["cuda_sm90"]["reason"]
    strided, linear = registry.conv(1, 3, 6, 3, stride=2), registry.linear(4, 3)
    assert methods["cuda_sm90"].why_not(strided) == "strided"
    assert "cuda_direct" in kernels.chosen_methods("cuda_shift", FAST)["cuda_shift"].why_not(linear)


@pytest.mark.skipif(not runtime.INTERPRET, reason="needs CPU tensors")
def test_a_single_algorithm_is_no_rival():
    methods = kernels.chosen_methods("dbp,unfold,triton_direct,triton_shift", FAST)
    record = kernels.run_case(TINY, FAST, methods)
    ours = {name for name, m in record["methods"].items() if m.get("ours")}
    assert ours == {"triton_direct", "triton_shift"}
    assert {m["status"] for m in record["methods"].values()} == {"ok"}
    for name in ours:
        record["methods"][name]["seconds"]["median"] = 1e-9
    assert bars._fastest_rival(record["methods"], but="") == "unfold"
    means = kernels.geometric_means([record])
    assert means["best rival, all cases"] == means["unfold, all cases"]


def test_methods_are_for_the_kernels_suite(capsys):
    assert cli.main(["--suite", "step", "--methods", "dbp"]) == 2
    assert "--methods is for kernels" in capsys.readouterr().err
    assert cli.main(["--suite", "kernels", "--methods", "none"]) == 2
    assert "--methods none" in capsys.readouterr().err
