"""An error at every torch call of a step, before the call and after it has taken effect."""

import pytest
from faults import MODES, AtOperator, InjectedError, Judge, Run, caught

BUDGET = {"budget": 0.3, "costs": "planned"}
RUNS = {
    "layers": lambda: Run(False),
    "layers, budget": lambda: Run(False, options=BUDGET),
    "layers, no guard": lambda: Run(False, options={"clip": None, "rule": "normalized"}),
    "layers, guard at work": lambda: Run(False, options={"lr": 5.0, "clip": 0.3}),
    "layers, a NaN": lambda: Run(False, poison=True),
    "attach": lambda: Run(True),
    "attach, budget": lambda: Run(True, options=BUDGET),
    "attach, SGD, turns": lambda: Run(True, "sgd", options={"update_every": 2}),
    "attach, one by one": lambda: Run(True, "adamw, one by one", options={"lr": 5.0, "clip": 0.3}),
    "attach, fused": lambda: Run(True, "adamw, fused"),
}


@pytest.mark.kind("injections")
@pytest.mark.parametrize("name", ["layers", "attach"])
def test_an_error_at_every_operator(name, campaign):
    """Before one, after the next; the next time round the other way."""
    judge = Judge(RUNS[name])
    calls = calls_of(judge, AtOperator)
    assert calls > 200
    for case, random in enumerate(campaign.cases(calls)):
        turn, place = divmod(case, calls)
        error = AtOperator(place + 1, after=(turn + place) % 2 == 1)
        try_one(judge, error, goes_on=random.random() < 0.05)


@pytest.mark.kind("injections")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", RUNS)
def test_an_error_anywhere(name, mode, campaign):
    """At a function that is called anywhere in a step, or often in the part where R changes."""
    judge = Judge(RUNS[name])
    calls = calls_of(judge, mode)
    seen = set()
    for random in campaign.cases(30):
        first = random.choice([1, calls * 2 // 3])
        error = mode(random.randint(first, calls), random.random() < 0.5)
        seen.add(try_one(judge, error, goes_on=random.random() < 0.3))
    assert seen == {False, True}  # errors before R changed, and later


def try_one(judge, error, goes_on):
    run = judge.ready()
    with caught(InjectedError) as errors, error:
        run.step()
    assert errors
    return judge.check(run, same_W=error.ours, goes_on=goes_on)


def calls_of(judge, mode):
    run, counted = judge.ready(), mode(0, False)
    with counted:
        run.step()
    return counted.calls
