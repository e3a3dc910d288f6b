"""Where a decorrelated step's extra time goes; traces; samplings and compiled steps."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from bench import cli
from bench.core import breakdown, networks
from bench.core.breakdown import breakdown_table
from bench.suites import kernels, steps, updates
from bench.suites.steps import sampling_table
from dbp_kernels import phases
from dbp_kernels.optim.site import Site

CPU = torch.device("cpu")


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 40, 3, padding=1),  # many patches: by their second moment
        nn.Flatten(),
        nn.Linear(40 * 6 * 6, 5),  # few: by themselves
    )


TINY = networks.StepCase("tiny 6x6", small, 8, 6, 5, 2)
FAST = kernels.Settings(pairs=2, warmup=1)


def our_step(make=steps.decorrelated_step):
    torch.manual_seed(0)
    step = make(small(), 1.0, torch.float32)
    images, labels = steps.random_images(TINY, FAST, 64)
    return lambda: step(images, labels)


@pytest.mark.parametrize("make", [steps.decorrelated_step, steps.attached_step])
def test_every_part_is_found(make):
    found = breakdown.parts_of(our_step(make), CPU, rounds=1)
    assert found.pop(breakdown.PLAIN) < found[breakdown.OURS]
    assert found.pop(breakdown.REPLAY) == 0  # of a CUDA graph
    assert set(found) == {*breakdown.PARTS, breakdown.STEP, breakdown.OURS}
    assert all(seconds > 0 for seconds in found.values())
    assert sum(found.values()) - found[breakdown.OURS] <= found[breakdown.OURS]


def test_the_backward_of_a_is_that_of_its_product_alone(monkeypatch):
    """A slow backward pass of A counts, one of the convolution does not."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.randn(10_000_000)  # some 50 ms
            return grad

    from dbp_kernels import ops

    plain = ops.condensed_weight
    slowly = phases.phase(phases.CONDENSE)(lambda w, R, g=1: Slow.apply(plain(w, R, g)))
    monkeypatch.setattr(ops, "condensed_weight", slowly)
    slow = breakdown.parts_of(our_step(), CPU, rounds=1)[breakdown.BACKWARD]
    monkeypatch.undo()
    linear = ops.F.linear
    monkeypatch.setattr(ops.F, "linear", lambda x, A, b=None: Slow.apply(linear(x, A, b)))
    other = breakdown.parts_of(our_step(), CPU, rounds=1)[breakdown.BACKWARD]
    assert slow > 4 * other


def test_parts_add_up():
    parts = breakdown.breakdown(our_step(), lambda: time.sleep(1), CPU)
    total = parts.pop("extra")
    assert sum(parts.values()) == pytest.approx(total, rel=1e-2)
    assert -1.01 < total < -0.5  # the plain step's time is taken off


def test_nested_ranges_have_their_own_time_only(monkeypatch):
    """In attach's form A = W R is formed within step()."""
    before = our_step(steps.attached_step)
    slow = breakdown.parts_of(before, CPU, rounds=1)
    monkeypatch.setattr(
        Site, "condensed", lambda site, plain=Site.condensed: time.sleep(0.1) or plain(site)
    )
    found = breakdown.parts_of(our_step(steps.attached_step), CPU, rounds=1)
    assert found[breakdown.CONDENSE] > 0.3  # three layers
    assert found[breakdown.STEP] < slow[breakdown.STEP] + 0.1


class Event:
    """As the profiler's ``FunctionEvent``, of a host's call that launched kernels, us each."""

    device_type, is_user_annotation, scope, sequence_nr = DeviceType.CPU, False, 0, -1

    def __init__(self, name, at, *kernels, parent=None, **more):
        self.name, self.cpu_parent = name, parent
        self.time_range = SimpleNamespace(start=at, end=at + 1)
        self.kernels = [SimpleNamespace(name=f"k{us}", duration=us) for us in kernels]
        vars(self).update(more)


def test_kernels_count_where_they_are_launched():
    """A backward pass is launched by another thread, a CUDA graph's kernels by its replay."""
    own = lambda part: breakdown.PREFIX + part  # noqa: E731
    whole = Event(own(breakdown.OURS), 0, is_user_annotation=True)
    whole.time_range.end = 100
    step = Event("Optimizer.step#Engine.step", 10, parent=whole)
    step.kernels = [SimpleNamespace(name=step.name, duration=900)]  # the range's copy on the device
    step.is_user_annotation = True
    form = Event(own(breakdown.CONDENSE), 1, parent=whole, is_user_annotation=True)
    made = Event("aten::mm", 2, 3, parent=form, sequence_nr=7)
    unmade = Event("aten::to", 3, parent=form, sequence_nr=8)  # the convolution makes node 8
    events = [
        whole,
        step,
        form,
        made,
        unmade,
        Event("aten::conv", 5, 7, parent=whole, sequence_nr=8),
    ]
    for number, us in ((7, 11), (8, 13)):
        node = Event("autograd::engine::evaluate_function: X", 20, sequence_nr=number, scope=1)
        events += [node, Event("aten::mm", 20, us, parent=node)]
    events += [Event("launch", 30, 17, 19, parent=step)]
    events += [
        Event("cudaGraphLaunch", 40, 23, parent=Event(own(breakdown.REPLAY), 40, parent=step))
    ]
    events += [Event("elsewhere", 200, 29)]
    found = {
        part: us
        for part, s in breakdown.phase_times(events, True).items()
        if (us := round(1e6 * s))
    }
    assert found == {
        breakdown.CONDENSE: 3,
        breakdown.BACKWARD: 11,
        breakdown.STEP: 17 + 19,
        breakdown.REPLAY: 23,
        breakdown.OURS: 3 + 7 + 11 + 13 + 17 + 19 + 23,
    }


def test_breakdown_table_shows_shares():
    record = {"name": "net", "breakdown": {"a": 0.1, "b": 0.3, "extra": 0.4}}
    table = breakdown_table([record])
    assert "100.0 (25%)" in table
    assert "400.0 (100%)" in table


def test_a_step_is_broken_down_and_varied():
    record = steps.run_step_case(TINY, FAST, samplings=True, faster=True)
    names = {"bp", "dbp", "published", "dbp 100%", "dbp 10%", "dbp 1%", steps.IDLE}
    names |= {"dbp medium", "dbp layers", "dbp layers overlap"}
    assert set(record["methods"]) == names
    assert {method["status"] for method in record["methods"].values()} == {"ok"}
    assert "extra" in record["breakdown"]


def test_times_stand_without_a_profiler(monkeypatch):
    def refused(*arguments):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(steps, "breakdown", refused)
    record = steps.run_step_case(TINY, FAST, methods=("bp", "dbp"))
    assert record["no_breakdown"] == "RuntimeError: no profiler"
    assert "seconds" in record["methods"]["dbp"]


def test_an_idle_step_takes_no_samples_and_leaves_r_alone():
    model = small()
    step = steps.sampling_variants(torch.float32)[steps.IDLE](model)
    images, labels = steps.random_images(TINY, FAST, 8)
    step(images, labels)
    (feed,) = model[0]._forward_hooks.values()
    R = feed.site.R.clone()
    assert not torch.equal(R, torch.eye(27))
    step(images, labels)
    assert torch.equal(feed.site.R, R)


def test_sampling_table_averages_one_update_over_k_steps():
    def method(seconds: float) -> dict:
        return {"status": "ok", "seconds": {"median": seconds}}

    methods = {"bp": method(1.0), steps.IDLE: method(1.1), "dbp 100%": method(5.1)}
    table = sampling_table([{"name": "net", "methods": methods}])
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[2:6] == ["100%", "5.100", "2.100", "1.350"]
    assert "-" in table.splitlines()[3]


@pytest.mark.parametrize("suite", ["step", "update"])
def test_trace_opens_as_json_with_its_ranges(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "STEP_CASES", (TINY,))
    monkeypatch.setattr(updates, "CPU_CASES", (TINY,))
    trace = tmp_path / "new" / "trace.json"
    assert cli.main(["--suite", suite, "--filter", "tiny", "--quick", "--trace", str(trace)]) == 0
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"dbp", "published", "dbp: " + breakdown.PRODUCTS} <= names
    assert ("dbp: " + breakdown.CONDENSE in names) or suite == "update"


def test_several_networks_have_a_trace_each(tmp_path, monkeypatch):
    from bench import suites

    options = cli.parser().parse_args(["--suite", "step", "--trace", str(tmp_path / "t.json")])
    seen = []
    monkeypatch.setattr(
        steps, "run_step_case", lambda case, *a, trace, **o: seen.append(trace.name)
    )
    for job in suites.jobs(options):
        job.run(lambda: None)
    assert seen == ["t-convnet-32x32-b128.json", "t-resnet18-32x32-b128.json"]


def test_trace_is_refused_where_there_is_none(capsys):
    assert cli.main(["--trace", "x.json"]) == 2
    assert "--trace" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_steps():
    record = steps.run_step_case(TINY, FAST, methods=("bp", "dbp"), compiled="default")
    assert set(record["methods"]) == {"bp", "dbp", "bp default", "dbp default"}
    assert {method["status"] for method in record["methods"].values()} == {"ok"}
