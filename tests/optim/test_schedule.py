"""The schedule of a budget: pure decisions from costs, losses and steps."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels.optim.schedule import (
    CALIBRATIONS,
    ROUNDS,
    WARM_UP,
    WINDOW,
    Schedule,
    fit_costs,
    fit_samples,
)

seconds = st.floats(1e-5, 1.0)
layer_costs = st.lists(seconds, min_size=1, max_size=8)
shares = st.floats(0.005, 0.5)


def make(costs, share, base=1.0, every=None) -> Schedule:
    """Past its warm-up, with one sample size per layer."""
    schedule = Schedule(share, len(costs))
    schedule.overhead = 0.0
    schedule.sizes = [((1.0, cost),) for cost in costs]
    everything = list(range(len(costs)))
    for _ in range(WARM_UP - 1):
        assert schedule.chosen == everything
        schedule.choose(everything, [1] * len(costs))
    schedule.calibrate(base, every or [1] * len(costs))
    return schedule


def run(schedule: Schedule, steps: int, loss=lambda layer, count: 1.0) -> list[list[int]]:
    """The choices of so many steps; ``loss`` is reported at each update."""
    count = len(schedule.sizes)
    choices = []
    for _ in range(steps):
        choices.append(list(schedule.choose(range(count), [1] * count)))
        for layer in choices[-1]:
            schedule.observe(layer, loss(layer, schedule.updates[layer]))
    return choices


def spent(schedule: Schedule, choices: list[list[int]]) -> list[float]:
    return [sum(schedule.cost(layer) for layer in chosen) for chosen in choices]


@given(layer_costs, shares, st.floats(0.0, 1.0))
def test_the_budget_is_kept_spent_and_even(costs, share, slope):
    schedule = make(costs, share)
    allowance = share / (1 - share)
    steps = 200
    choices = run(schedule, steps, lambda layer, count: 1 / (1 + slope * count * (layer + 1)))
    times = spent(schedule, choices)
    slack = 1 + 1e-9
    # never more than was allowed so far, and at every step no more than one update beyond
    for step in range(steps):
        assert sum(times[: step + 1]) <= (step + 1) * allowance * slack
    assert max(times) <= (allowance + max(costs)) * slack
    # and nothing is wasted: only less than the dearest update is left, unless all layers had all
    if sum(costs) > allowance:
        assert sum(times) >= (steps * allowance - max(costs) - allowance) / slack
    else:
        assert choices[1:] == [list(range(len(costs)))] * (steps - 1)


@given(layer_costs, shares, st.data())
def test_no_layer_starves(costs, share, data):
    """Though their losses differ by powers of ten, or vanish."""
    scale = [data.draw(st.sampled_from([0.0, 1e-9, 1.0, 1e9])) for _ in costs]
    schedule = make(costs, share)
    turn = max(1.0, sum(costs) / schedule.allowance)
    bound = (ROUNDS + 2) * turn + 3
    steps = min(2000, int(2 * bound) + 2)
    choices = run(schedule, steps, lambda layer, count: scale[layer])
    for layer in range(len(costs)):
        last = 0
        for step, chosen in enumerate([*choices, range(len(costs))] if bound < steps else choices):
            if layer in chosen:
                assert step - last <= bound
                last = step


def test_equal_gains_get_equal_time():
    costs = [0.001, 0.004, 0.016]
    schedule = make(costs, 0.001)
    times = [0.0] * 3
    for chosen in run(schedule, 3000):
        for layer in chosen:
            times[layer] += costs[layer]
    assert max(times) < 2 * min(times)  # against 16 with equal numbers of updates


def test_a_layer_whose_loss_still_falls_gets_more_updates():
    schedule = make([0.01] * 4, 0.01)
    # layer 2 falls by 5 % an update, the others not at all
    run(schedule, 60, lambda layer, count: 0.95**count if layer == 2 else 0.1)
    early = list(schedule.updates)
    assert early[2] > 2 * max(early[0], early[1], early[3])
    # and no longer once it has fallen
    run(schedule, 2000, lambda layer, count: 1e-3 if layer == 2 else 0.1)
    late = [after - before for after, before in zip(schedule.updates, early)]
    assert late[2] < min(late[0], late[1], late[3])


def test_gain_tells_a_fall_from_noise():
    schedule = make([0.01], 0.01)
    assert schedule.gain(0) is None
    for loss in (float("nan"), float("inf")):
        schedule.observe(0, loss)
    assert schedule.gain(0) is None
    schedule.observe(0, 2.0)
    assert schedule.gain(0) == pytest.approx(0.02)
    for _ in range(WINDOW - 1):
        schedule.observe(0, 2.0)
    for _ in range(WINDOW):
        schedule.observe(0, 1.0)
    assert schedule.gain(0) == pytest.approx(1 / WINDOW)
    assert len(schedule.losses[0]) == 2 * WINDOW


@given(layer_costs, st.lists(st.floats(0.2, 5.0), min_size=8, max_size=8), shares)
def test_equal_states_decide_alike(costs, levels, share):
    """Also after a checkpoint through JSON in mid-run."""

    def loss(layer, count):
        return levels[layer] * 0.97**count

    first, second = make(costs, share), make(costs, share)
    assert run(first, 40, loss) == run(second, 40, loss)
    saved = json.loads(json.dumps(first.state()))
    copied = Schedule(share, len(costs))
    copied.load(saved)
    assert copied.state() == first.state()
    assert run(copied, 60, loss) == run(first, 60, loss)
    assert run(second, 60, loss) == run(loaded(saved, share), 60, loss)


def loaded(state, share) -> Schedule:
    schedule = Schedule(share, len(state["sizes"]))
    schedule.load(state)
    return schedule


def test_a_state_is_a_snapshot_and_keeps_the_share():
    schedule = make([0.01, 0.02], 0.05)
    state = schedule.state()
    before = copy.deepcopy(state)
    other = Schedule(0.1, 2)
    other.load(state)
    run(schedule, 30)
    run(other, 30)
    assert state == before
    assert other.share == 0.1


@pytest.mark.parametrize("what", ["layers", "missing", "type"])
def test_bad_states_change_nothing(what):
    schedule = make([0.01, 0.02], 0.05)
    before = schedule.state()
    state = make([0.01] * (3 if what == "layers" else 2), 0.05).state()
    if what == "missing":
        del state["bank"]
    with pytest.raises(ValueError, match="schedule"):
        schedule.load(None if what == "type" else state)
    assert schedule.state() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", "all"),
        ("step", -1),
        ("step", True),
        ("base", float("nan")),
        ("base", -1.0),
        ("overhead", float("inf")),
        ("overhead", None),
        ("bank", 10**400),
        ("bank", [0.0]),
        ("chosen", [1, 0]),
        ("chosen", [0.0]),
        ("chosen", [True]),
        ("sizes", [[], [[0.5, 1e-3]]]),
        ("sizes", [[], [[1.0, 1e-3], [1.0, 1e-3]]]),
        ("sizes", [[], [[1.0, -1e-3]]]),
        ("sizes", [[], [[1.0]]]),
        ("scale", [1.0, 0.0]),
        ("scale", [1.0, "1"]),
        ("size", [0, 1]),
        ("size", [0, False]),
        ("last", [-1, 10**6]),
        ("last", [-1, None]),
        ("updates", [0, -1]),
        ("losses", [[], [float("nan")]]),
        ("losses", [[], 0.5]),
        ("losses", [[], [0.5] * 100]),
    ],
)
def test_every_entry_of_a_state_is_checked(key, value):
    schedule = make([0.01, 0.02], 0.05)
    run(schedule, 7)
    before, state = schedule.state(), schedule.state()
    state[key] = value
    if key == "size":
        state["sizes"] = [[[1.0, 1e-3]]] * 2
    with pytest.raises(ValueError, match=rf"schedule has .*{key}"):
        schedule.load(state)
    assert schedule.state() == before


def test_warm_up_is_dense_and_free():
    schedule = make([1.0, 2.0], 0.01)
    assert schedule.step == WARM_UP - 1
    assert schedule.bank == 0
    assert schedule.updates == [0, 0]
    assert CALIBRATIONS[0] == WARM_UP
    assert run(schedule, 50)[0] == []


def test_without_a_known_step_time_every_layer_is_updated():
    schedule = Schedule(0.1, 2)
    assert run(schedule, 20) == [[0, 1]] * 20


def test_a_layer_of_unknown_cost_is_always_updated():
    schedule = make([1.0, 1.0], 0.01)
    schedule.sizes[0] = ()
    assert all(0 in chosen for chosen in run(schedule, 30))


def test_a_budget_below_the_overhead_updates_nothing():
    schedule = make([0.01], 0.01)
    schedule.overhead = 1.0
    assert schedule.allowance == 0
    assert run(schedule, 30) == [[]] * 30


def test_layers_that_can_only_update_at_some_steps():
    schedule = make([0.01, 0.01], 0.01, every=[1, 4])
    seen = [0, 0]
    for step in range(400):
        possible = [0, 1] if step % 4 == 0 else [0]
        for layer in schedule.choose(possible, [1, 4]):
            assert layer in possible
            seen[layer] += 1
    assert seen[1] >= 98  # 400 steps of 0.0101 s pay for both
    assert seen[0] >= 300


@given(layer_costs, layer_costs, st.floats(1e-5, 1e-2), st.data())
def test_fitted_costs_add_up_to_what_was_measured(planned, true, overhead, data):
    count = min(len(planned), len(true))
    planned, true = planned[:count], true[:count]
    subsets = st.lists(st.sets(st.integers(0, count - 1)), min_size=1, max_size=12)
    chosen = [sorted(s) for s in data.draw(subsets)]
    steps = [(layers, sum(true[i] for i in layers) + 1e-4) for layers in chosen]
    fitted, rest = fit_costs(planned, overhead, steps)
    assert all(cost > 0 for cost in fitted)
    assert rest > 0
    untouched = set(range(count)) - {i for layers in chosen for i in layers}
    assert all(fitted[i] == planned[i] for i in untouched)


def test_fitted_costs():
    # dense steps alone: all by one factor
    fitted, overhead = fit_costs([1.0, 3.0], 1e-9, [([0, 1], 2.0)] * 3)
    assert fitted == pytest.approx([0.5, 1.5])
    # steps of single layers: each its own, and the sum is right
    steps = [([0], 1.01), ([1], 5.01), ([], 0.01), ([0, 1], 6.01)]
    fitted, overhead = fit_costs([3.0, 3.0], 0.1, steps * 5)
    assert fitted == pytest.approx([1.0, 5.0], rel=0.05)
    assert overhead == pytest.approx(0.01, rel=0.3)
    predicted = sum(sum(fitted[i] for i in layers) + overhead for layers, _ in steps)
    assert predicted == pytest.approx(sum(s for _, s in steps), rel=0.01)
    # one step in ten that was interrupted for a minute
    fitted, _ = fit_costs([1.0], 1e-9, [([0], 2.0)] * 9 + [([0], 60.0)])
    assert 2.0 <= fitted[0] < 2.7
    assert fit_costs([1.0], 0.5, []) == ([1.0], 0.5)


def test_samples_shrink_before_updates_become_rarer():
    sizes = [[8.0, 4.0, 2.0], [1.0, 0.95, 0.5], [6.0, 3.0]]
    assert fit_samples(sizes, [1, 1, 1], 15.0) == [0, 0, 0]
    assert fit_samples(sizes, [1, 1, 1], 11.0) == [1, 0, 0]
    assert fit_samples(sizes, [1, 1, 1], 8.0) == [1, 0, 1]
    # layer 1 would hardly get cheaper
    assert fit_samples(sizes, [1, 1, 1], 0.1) == [2, 0, 1]
    # a layer that updates every fourth step costs a fourth
    assert fit_samples(sizes, [4, 1, 1], 9.0) == [0, 0, 0]


@given(st.lists(st.lists(seconds, min_size=1, max_size=5), min_size=1, max_size=6), seconds)
def test_samples_are_valid_sizes(sizes, allowance):
    sizes = [sorted(s, reverse=True) for s in sizes]
    chosen = fit_samples(sizes, [1] * len(sizes), allowance)
    assert all(0 <= i < len(s) for i, s in zip(chosen, sizes))
    assert sum(s[0] for s in sizes) > allowance or not any(chosen)


def test_calibration_forgets_the_losses_of_another_sample_size():
    schedule = Schedule(0.1, 2)
    schedule.overhead = 0.0
    schedule.sizes = [((1.0, 0.08), (0.5, 0.04)), ((1.0, 0.05),)]
    for layer in (0, 1):
        schedule.observe(layer, 1.0)
    schedule.calibrate(1.0, [1, 1])
    assert [schedule.part(layer) for layer in (0, 1)] == [0.5, 1.0]
    assert schedule.losses == [[], [1.0]]
    # twice as slow a machine: the shares stay, only times change
    schedule.calibrate(2.0, [1, 1], [([0, 1], 0.18)] * 4)
    assert schedule.cost(0) + schedule.cost(1) + schedule.overhead == pytest.approx(0.18)


def test_calibration_makes_up_for_what_was_spent():
    """Costs twice as high as thought: what is overspent until then is saved afterwards."""
    schedule = make([0.03, 0.05], 0.05)
    true = [0.06, 0.10]
    choices = run(schedule, 10)
    steps = [(chosen, sum(true[i] for i in chosen)) for chosen in choices]
    spent = sum(seconds for _, seconds in steps)
    allowance = schedule.allowance
    assert spent > 1.5 * 10 * allowance
    schedule.calibrate(1.0, [1, 1], [(chosen, seconds + 1e-4) for chosen, seconds in steps])
    assert schedule.cost(0) + schedule.cost(1) == pytest.approx(0.16, rel=0.02)
    assert schedule.bank == pytest.approx(10 * allowance - spent, abs=0.01)
    later = [sum(true[i] for i in chosen) for chosen in run(schedule, 30)]
    assert (spent + sum(later)) / 40 == pytest.approx(allowance, rel=0.1)


def test_steps_without_updates_tell_the_overhead():
    costs, overhead = fit_costs([1.0], 1e-4, [([], 2e-5)] * 5)
    assert costs == [1.0]
    assert overhead == pytest.approx(2e-5)
