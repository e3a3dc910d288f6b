"""DecorUpdate(budget=...): the share is kept, the chosen updates are the usual ones, runs resume."""

import copy
import io
import pickle
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import clock
from dbp_kernels import nn as dnn
from dbp_kernels.optim import budget as budget_module
from dbp_kernels.optim import decor_update
from dbp_kernels.optim.schedule import CALIBRATIONS, WARM_UP
from dbp_kernels.planning import planner

D64 = torch.float64
SIZES = (24, 48, 96, 192)


# The rates of one device: what a schedule does with planned costs must not depend on the machine.
RATES = {
    "product": (
        (1, 1.33),
        (8, 19.7),
        (32, 70.1),
        (64, 73.1),
        (96, 123.0),
        (128, 96.9),
        (512, 110.0),
    ),
    "narrow": ((4, 15.7), (16, 53.0), (64, 70.3), (128, 77.1), (256, 102.0), (512, 125.0)),
    "gbytes": 11.1,
    "call": 8.98e-07,
    "fresh": 1.2,
}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    planner.reset()
    own = planner.machine
    monkeypatch.setattr(planner, "machine", cache(lambda *which: replace(own(*which), **RATES)))
    yield
    monkeypatch.undo()
    planner.reset()


def network() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([dnn.DecorLinear(size, 2) for size in SIZES]).to(D64)


@cache
def inputs(seed: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, dtype=D64, generator=generator) for size in SIZES]


def feed(net: nn.Module, step: int, rows: int = 640) -> list[torch.Tensor]:
    xs = inputs(step % 7, rows)
    for layer, x in zip(net, xs):
        layer(x)
    return xs


def recorders(decor: dbp.DecorUpdate) -> list:
    return [recorder for group in decor._recorders for recorder in group]


def chosen(decor: dbp.DecorUpdate) -> list[int]:
    return list(decor._budget.schedule.chosen)


class World:
    """A clock that only the training itself moves: ``base`` seconds a step, and its updates.

    The true cost of an update is not the planner's: ``images`` and R's size by other factors.
    """

    def __init__(self, monkeypatch, base: float) -> None:
        self.now, self.base, self.update, self.steps = 0.0, base, [], 0
        monkeypatch.setattr(clock, "host", lambda: self.now)
        original = decor_update.local_updates

        def timed(jobs, gate):
            cost = 2e-4
            for job in jobs:
                size, images = job.R.shape[-1], sum(len(s) for s in job.samples)
                cost += 1e-4 + 4e-7 * size**2 + 1e-8 * size**1.5 * images
            self.now += cost
            self.update.append(cost)
            return original(jobs, gate)

        monkeypatch.setattr(decor_update, "local_updates", timed)

    def train(self, net: nn.Module, decor: dbp.DecorUpdate, steps: int) -> None:
        for _ in range(steps):
            feed(net, self.steps)
            self.now += self.base
            decor.step()
            self.steps += 1

    def share(self, since: int) -> float:
        update = sum(self.update[since:])
        return update / (update + self.base * (self.steps - since))


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("base", [0.08, 1.0])
def test_the_share_is_kept_whatever_the_planner_thinks(share, base, monkeypatch):
    net = network()
    world = World(monkeypatch, base)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=share)
    world.train(net, decor, 400)
    dense = world.update[WARM_UP - 1]
    assert world.update[:WARM_UP] == [dense] * WARM_UP
    actual, unlimited = world.share(45), dense / (dense + base)
    report = decor.schedule()
    assert actual <= 1.1 * share
    assert actual >= 0.85 * min(share, unlimited)
    assert report.actual == pytest.approx(world.share(400 - 256), rel=0.01)
    assert report.planned == pytest.approx(world.share(WARM_UP), rel=0.15)
    assert report.step_seconds == pytest.approx(base)
    # even: no step takes much more than the dearest update beyond the average
    most = max(layer.seconds for layer in report.layers)
    assert max(world.update[45:]) <= 1.25 * (most + base * share / (1 - share)) + 2e-4


def test_a_budget_that_pays_for_everything_changes_nothing(monkeypatch):
    net, plain = network(), network()
    world = World(monkeypatch, 1.0)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.9)
    world.train(net, decor, 60)
    without = dbp.DecorUpdate(plain, lr=1e-3)
    for step in range(60):
        feed(plain, step)
        without.step()
    for a, b in zip(net, plain):
        assert torch.equal(a.R, b.R)
    assert [layer.interval for layer in decor.schedule().layers] == [1.0] * 4


def test_chosen_updates_are_the_usual_ones_and_others_do_not_happen(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.08)
    decor = dbp.DecorUpdate(net, lr=1e-2, budget=0.03, sample=0.5)
    seen, smaller = set(), 0
    for step in range(60):
        layers = chosen(decor)
        seen.update([tuple(layers)])
        parts = [decor._budget.schedule.part(i) for i in range(4)]
        smaller += min(parts) < 1
        before = [layer.R.clone() for layer in net]
        xs = feed(net, step)
        counts = [sum(len(s) for s in recorder.samples) for recorder in recorders(decor)]
        expected = [round(320 * part) if i in layers else 0 for i, part in enumerate(parts)]
        assert counts == expected
        world.now += world.base
        decor.step()
        for i, (layer, x, R) in enumerate(zip(net, xs, before)):
            if i in layers:
                R = dbp.decor_update(x[: counts[i]], R, lr=1e-2, kappa=0.5, kernel_size=())[0]
                torch.testing.assert_close(layer.R, R, rtol=1e-10, atol=1e-12)
            else:
                assert torch.equal(layer.R, R)
    assert len(seen) > 3
    assert smaller


@pytest.mark.parametrize("restore", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("costs", ["measured", "planned"])
def test_a_restored_run_updates_the_same_layers(restore, costs, monkeypatch):
    """With measured costs once they are set for good, with planned ones from any step."""
    net = network()
    options = {"lr": 1e-3, "budget": 0.3, "costs": costs, "sampling": "random"}
    decor = dbp.DecorUpdate(net, **options)
    world = World(monkeypatch, 0.005)
    world.train(net, decor, 7 if costs == "planned" else CALIBRATIONS[-1] + 3)
    if restore == "state_dict":
        buffer = io.BytesIO()
        torch.save([net.state_dict(), decor.state_dict()], buffer)
        saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        net2 = network()
        decor2 = dbp.DecorUpdate(net2, **options)
        feed(net2, 0)
        decor2.step()
        net2.load_state_dict(saved[0])
        decor2.load_state_dict(saved[1])
    elif restore == "deepcopy":
        net2, decor2 = copy.deepcopy((net, decor))
    else:
        net2, decor2 = pickle.loads(pickle.dumps((net, decor)))
    choices = []
    for step in range(40):
        assert chosen(decor) == chosen(decor2)
        choices.append(tuple(chosen(decor)))
        for model, optimiser in ((net, decor), (net2, decor2)):
            feed(model, step)
            # the copy runs on a machine of another speed
            world.now += 0.005 if optimiser is decor else 0.5
            optimiser.step()
        for a, b in zip(net, net2):
            assert torch.equal(a.R, b.R)
    assert len(set(choices)) > 2
    assert decor.schedule().layers == decor2.schedule().layers


def test_planned_costs_need_no_clock():
    """Two runs of different speed update alike; so under deterministic algorithms."""
    choices = []
    for costs, pause in (("planned", 0.0), ("planned", 2e-3), ("measured", 1e-3)):
        net = network()
        decor = dbp.DecorUpdate(net, budget=0.3, costs=costs)
        torch.use_deterministic_algorithms(costs == "measured")
        try:
            chosen_by = []
            for step in range(40):
                chosen_by.append(chosen(decor))
                feed(net, step)
                time.sleep(pause)
                decor.step()
        finally:
            torch.use_deterministic_algorithms(False)
        choices.append(chosen_by)
    assert choices[0] == choices[1] == choices[2]
    machine = planner.machine("cpu")
    assert decor.schedule().step_seconds == pytest.approx(
        sum(6 * 640 * m.weight.numel() for m in net) / (machine.peak * budget_module._STEP_RATE)
        + 4 * budget_module._STEP_CALLS * machine.call
    )


def test_a_budget_that_pays_for_no_update_warns():
    net = network()
    decor = dbp.DecorUpdate(net, budget=1e-6, costs="planned")
    for step in range(CALIBRATIONS[1] - 1):
        feed(net, step)
        decor.step()
        assert step < WARM_UP - 1 or chosen(decor) == []
    with pytest.warns(RuntimeWarning, match="budget=1e-06 pays for no update"):
        decor.step()


@pytest.mark.parametrize("bad", [0, 0.0, 1, 1.0, -0.1, 5, True, "0.1", float("nan")])
def test_bad_budgets(bad):
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match=r"^budget=.*above 0 and below 1"):
        dbp.DecorUpdate(layer, budget=bad)
    assert layer._recorder is None


def test_bad_costs_and_groups():
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match=r"^costs='guessed'"):
        dbp.DecorUpdate(layer, budget=0.1, costs="guessed")
    with pytest.raises(ValueError, match="unknown options"):
        dbp.DecorUpdate([{"modules": layer, "budget": 0.1}])
    assert layer._recorder is None


def test_without_a_budget_nothing_is_kept():
    layer = dnn.DecorLinear(3, 2)
    decor = dbp.DecorUpdate(layer)
    assert "budget" not in decor.state_dict()
    with pytest.raises(RuntimeError, match="no budget"):
        decor.schedule()


def test_state_dicts_with_and_without_a_schedule(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.05)
    decor = dbp.DecorUpdate(net, budget=0.05)
    world.train(net, decor, 30)
    saved = decor.state_dict()
    plain = dbp.DecorUpdate(network())
    plain.load_state_dict(saved)  # a schedule is of no use to it
    assert plain._steps == 30
    other = dbp.DecorUpdate(network(), budget=0.1)
    other.load_state_dict(saved)
    assert other.schedule().budget == 0.1
    assert other.schedule().steps == 25
    other.load_state_dict(plain.state_dict())  # begins with a warm-up
    assert other.schedule().steps == 0
    assert chosen(other) == [0, 1, 2, 3]


@pytest.mark.parametrize("what", ["type", "key", "layers"])
def test_a_bad_schedule_changes_nothing(what, monkeypatch):
    net = network()
    world = World(monkeypatch, 0.05)
    decor = dbp.DecorUpdate(net, budget=0.05)
    world.train(net, decor, 30)
    saved = copy.deepcopy(decor.state_dict())
    saved["steps"] = 99
    if what == "type":
        saved["budget"] = 3
    elif what == "key":
        del saved["budget"]["schedule"]["bank"]
    else:
        saved["budget"]["schedule"]["scale"].pop()
    before = decor._budget.state()
    with pytest.raises(ValueError, match=r"budget|schedule"):
        decor.load_state_dict(saved)
    assert decor._steps == 30
    assert decor._budget.state() == before


def test_update_every_groups_and_frozen_layers(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.05)
    groups = [
        {"modules": net[:2], "update_every": 3, "sample": 64},
        {"modules": net[2:3]},
        {"modules": net[3:], "lr": 0.0},
    ]
    decor = dbp.DecorUpdate(groups, lr=1e-3, budget=0.04)
    for step in range(120):
        layers = chosen(decor)
        if step:
            assert 3 not in layers
            assert step % 3 == 0 or not {0, 1} & set(layers)
        world.train(net, decor, 1)
    report = decor.schedule()
    assert world.share(45) == pytest.approx(0.04, rel=0.15)
    assert [layer.updates > 0 for layer in report.layers] == [True, True, True, False]
    assert report.layers[3].images is None
    assert report.layers[0].images <= 64


def test_accumulation_and_discard(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.08)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.05)
    for step in range(150):
        for _ in range(3):
            feed(net, step, rows=200)
        if step % 10 == 5:
            decor.discard()
            assert not any(recorder.samples or recorder.seen for recorder in recorders(decor))
            continue
        world.now += world.base
        decor.step()
        world.steps += 1
    assert world.share(45) == pytest.approx(0.05, rel=0.15)


def test_add_param_group_begins_again(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.05)
    decor = dbp.DecorUpdate(net, budget=0.05)
    world.train(net, decor, 30)
    decor.add_param_group({"modules": [("more", dnn.DecorLinear(8, 2))]})
    assert chosen(decor) == [0, 1, 2, 3, 4]
    world.train(net, decor, 30)  # the new layer never runs
    report = decor.schedule()
    assert report.steps == 25
    assert report.layers[4].images is None


def test_compiled_layers_follow_the_schedule(monkeypatch):
    torch._dynamo.reset()
    net = network()
    world = World(monkeypatch, 0.08)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.03)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(xs):
        return [layer(x) for layer, x in zip(net, xs)]

    for _ in range(30):
        layers = chosen(decor)
        forward([torch.randn(640, m.in_features, dtype=D64) for m in net])
        assert [i for i, r in enumerate(recorders(decor)) if r.samples] == layers
        world.now += world.base
        decor.step()
    assert decor.schedule().planned < 0.1


def test_report(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.08)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.03)
    assert "warming up" in str(decor.schedule())
    world.train(net, decor, WARM_UP)
    assert "warming up" in str(decor.schedule())
    world.train(net, decor, 45)
    report = decor.schedule()
    text = str(report)
    assert "budget=0.03, costs='measured'" in repr(decor)
    assert report.steps == 45
    assert len(text.splitlines()) == 2 + 4 + 1
    assert "budget 3.00% of a step; planned" in text
    assert "a step without updates: 80.0 ms" in text
    done = [update for update in world.update[WARM_UP:] if update > 2e-4]
    assert 0 < len(done) <= sum(layer.updates for layer in report.layers)
    for layer in report.layers:
        assert layer.interval == pytest.approx(45 / layer.updates)
    parts = sum(layer.share for layer in report.layers)
    assert parts <= report.planned


def test_step_reads_nothing_younger_than_the_lag(monkeypatch):
    """So that it never waits for a device, but at the calibrations."""
    net = network()
    world = World(monkeypatch, 0.05)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.05)
    ages = []
    for name in ("read_losses", "read_times"):
        original = getattr(budget_module._Reading, name)

        def read(self, original=original):
            later = [r for r in decor._budget._pending if r.end > self.end]
            ages.append(len(later))
            return original(self)

        monkeypatch.setattr(budget_module._Reading, name, read)
    for step in range(60):
        ages.clear()
        world.train(net, decor, 1)
        if step + 1 not in CALIBRATIONS:
            assert set(ages) <= {budget_module._LAG}
    assert ages


def test_choosing_counts_as_part_of_the_update(monkeypatch):
    net = network()
    world = World(monkeypatch, 0.08)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.05)
    choose = decor._budget.schedule.choose

    def slow(*arguments):
        world.now += 2e-3
        world.update[-1] += 2e-3
        return choose(*arguments)

    monkeypatch.setattr(decor._budget.schedule, "choose", slow)
    world.train(net, decor, 200)
    assert world.share(45) == pytest.approx(0.05, rel=0.15)
    assert decor.schedule().actual == pytest.approx(world.share(45), rel=0.15)


# Two processes, whose clocks differ.


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    net = network()
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.05)
    choices = []
    for step in range(60):
        choices.append(chosen(decor))
        feed(net, step + 3 * rank, rows=640 if rank else 320)
        if rank == 0:
            time.sleep(4e-3)
        decor.step()
    state = decor._budget.schedule.state()
    torch.save([choices, state, net.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_ranks_update_the_same_layers(tmp_path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first[0] == second[0]
    assert len(set(map(tuple, first[0]))) > 2
    assert first[1] == second[1]
    for name, value in first[2].items():
        if name.endswith("R"):
            assert torch.equal(value, second[2][name])


def test_a_sample_in_images_shrinks_with_the_budget():
    """Also where it names more images than the batch has."""
    net = network()
    decor = dbp.DecorUpdate(net, budget=0.3, sample=4096)
    feed(net, 0)
    assert [r.samples[0].shape[0] for r in recorders(decor)] == [640] * len(net)
    decor.discard()
    decor._budget.schedule.sizes = [((1.0, 1.0), (0.5, 0.5), (0.25, 0.25))] * len(net)
    decor._budget.schedule.size = [2] * len(net)
    feed(net, 0)
    assert [r.samples[0].shape[0] for r in recorders(decor)] == [160] * len(net)


def test_a_layer_first_used_late_is_charged():
    net = network()
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=0.3, costs="planned")
    late = len(net) - 1
    schedule = decor._budget.schedule
    spent = []
    for step in range(CALIBRATIONS[-1] + 60):
        for i, (layer, x) in enumerate(zip(net, inputs(step % 7, 640))):
            if i < late or step > CALIBRATIONS[-1]:
                layer(x)
        decor.step()
        spent.append(sum(map(schedule.cost, chosen(decor))))
    assert schedule.cost(late) > 0
    assert 0.5 * schedule.allowance < sum(spent[-50:]) / 50 < 1.1 * schedule.allowance


def test_a_broken_budget_state_is_refused_and_an_old_pickle_loads():
    net = network()
    decor = dbp.DecorUpdate(net, budget=0.3)
    feed(net, 0)
    decor.step()
    broken = [
        ("images", None),
        ("images", [-1] * 3),
        ("images", [True] * 3),
        ("plain", []),
        ("plain", [float("nan")] * 3),
        ("pending", None),
        ("pending", [[[0], [0.5, 0.5]]]),
        ("pending", [[[99], [0.5]]]),
        ("pending", [[[0], [10**400]]]),
    ]
    for key, value in broken:
        saved = decor.state_dict()
        saved["budget"][key] = value
        with pytest.raises(ValueError, match=key):
            decor.load_state_dict(saved)
    saved = decor.state_dict()
    saved["budget"]["schedule"]["chosen"] = [99]
    with pytest.raises(ValueError, match="chosen"):
        decor.load_state_dict(saved)
    state = decor.__getstate__()
    for later in ("_budget", "_matmul_precision"):  # as before they were there
        del state[later]
    old = dbp.DecorUpdate.__new__(dbp.DecorUpdate)
    old.__setstate__(state)
    old.step()


def test_a_model_that_moves_begins_a_new_clock():
    net = network()
    decor = dbp.DecorUpdate(net, budget=0.3)
    for step in range(3):
        feed(net, step)
        decor.step()
        decor._budget._where = torch.device("meta")  # as if the last step had been elsewhere
    assert all(reading.before is None for reading in decor._budget._pending)
