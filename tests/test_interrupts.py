"""Signals and errors: nothing that belongs together is left half done."""

import os
import signal
import threading
import warnings

import pytest
import torch
from faults import MODES, AtFunction, InjectedError, Judge, Run, caught, equal

import dbp_kernels as dbp
from dbp_kernels import interrupts, rules
from dbp_kernels import nn as dnn
from dbp_kernels.interrupts import Once, carry_through, uninterrupted
from dbp_kernels.optim.budget import Budget
from dbp_kernels.optim.guard import Gauge
from dbp_kernels.optim.schedule import Schedule
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.write_back import WriteBack


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def pythons_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def within(work):
    with uninterrupted():
        interrupt()
        work()


def test_it_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        within(lambda: done.append(1))
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_errors_pass_and_handlers_of_the_program_are_called():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    before = []
    within(lambda: before.extend(seen))
    assert (before, seen) == ([], [signal.SIGINT])
    with pytest.raises(ZeroDivisionError):
        within(lambda: 1 / 0)
    assert seen == [signal.SIGINT] * 2


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_a_handler_there_is_nothing_to_do(ignored):
    signal.signal(signal.SIGINT, ignored)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is ignored


def test_other_threads_are_not_interrupted():
    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("images", [4, 400], ids=["samples", "gram or direct"])
def test_a_step_is_done_or_not_done(images, monkeypatch):
    """Interrupted while it changes R: both layers are updated, and the step counts."""

    def step(interrupted):
        torch.manual_seed(0)
        net = torch.nn.Sequential(dnn.DecorLinear(300, 300), dnn.DecorLinear(300, 2))
        update = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
        net(torch.randn(images, 300))
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                update.step()
        else:
            update.step()
        return [net[0].R, net[1].R], update.state_dict()

    Rs, state = step(interrupted=False)
    write = WriteBack.__call__
    monkeypatch.setattr(WriteBack, "__call__", lambda *a: (interrupt(), write(*a)))
    multiply = rules.add_product_
    monkeypatch.setattr(rules, "add_product_", lambda *a: (interrupt(), multiply(*a)))
    found, found_state = step(interrupted=True)
    for ours, expected in zip(found, Rs):
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, torch.eye(300))
    assert found_state["steps"] == state["steps"] == 1


def test_where_R_has_changed_all_optimisers_weights_follow_whatever_fails_then(monkeypatch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2)]
    options = {"lr": 0.1, "sample": 1.0, "budget": 0.5, "costs": "planned"}
    decor = dbp.attach(net, optimizers, **options)
    net(torch.randn(32, 6)).square().mean().backward()
    optimizers[0].step()

    def fail(*_):
        raise OverflowError

    monkeypatch.setattr(Budget, "_finish", fail)
    with pytest.raises(OverflowError):
        optimizers[1].step()
    for name in ("0", "2"):
        assert not torch.equal(decor.R(name), torch.eye(len(decor.R(name))))
        A = net.get_submodule(name).weight
        torch.testing.assert_close(A, decor.W(name) @ decor.R(name))


@pytest.fixture
def handlers():
    """Of signals whose handlers raise, as programs that must end in order have them."""

    def handler(number, frame):
        raise SystemExit(number)

    numbers = [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1]
    before = {number: signal.signal(number, handler) for number in numbers}
    yield dict.fromkeys(numbers, handler)
    for number, own in before.items():
        signal.signal(number, own)


def test_any_signal_with_a_handler_waits_and_all_handlers_are_called(handlers):
    done = []

    def work():
        for number in handlers:
            os.kill(os.getpid(), number)
        done.append(1)

    with pytest.raises(SystemExit) as raised:
        within(work)
    assert done
    codes, error = [], raised.value
    while error is not None:
        codes.append(getattr(error, "code", signal.SIGINT))
        error = error.__context__
    assert codes[::-1] == [signal.SIGINT, *handlers]  # in the order in which they came
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_signal_while_handlers_are_put_back_leaves_none_of_ours(handlers, monkeypatch):
    """The handler that is back raises before the others are."""
    put, restored = interrupts._signal.signal, []

    def watched(number, handler):
        before = put(number, handler)
        if handler is handlers[signal.SIGUSR1] and not restored:
            restored.append(number)
            os.kill(os.getpid(), signal.SIGUSR1)
        return before

    monkeypatch.setattr(interrupts._signal, "signal", watched)
    with pytest.raises(SystemExit), uninterrupted():
        pass
    assert restored
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("change", ["_foreach_add_", "_foreach_mul_"])
@pytest.mark.parametrize("after", [False, True])
def test_a_change_in_place_is_made_once(change, after):
    x, y = torch.rand(3, 3), torch.rand(3, 3)
    expected = x + y if change == "_foreach_add_" else x * y
    once = Once(getattr(torch, change), [x], [y])
    with pytest.raises(InjectedError), AtFunction(1, after):
        once()
    for _ in range(2):
        once()
        assert torch.equal(x, expected)


def test_what_is_interrupted_is_finished_and_then_raised():
    done = []

    def failing():
        done.append(1)
        if len(done) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        carry_through(failing, lambda: done.append(2))
    assert done == [1, 1, 2]
    done.clear()
    with pytest.raises(KeyError):  # again: what comes after it is not begun
        carry_through(lambda: {}["nothing"], lambda: done.append(2))
    assert not done


def inference(R):
    with torch.inference_mode():
        return R.clone()


UNWRITABLE = {
    "expanded": (lambda R: R[:1].expand(R.shape), "is expanded to"),
    "made in inference mode": (inference, "was made in inference mode"),
}


@pytest.mark.parametrize(
    ("where", "kind"), [("R", kind) for kind in UNWRITABLE] + [("loss", "made in inference mode")]
)
def test_what_cannot_be_written_to_is_found_before_anything_changes(where, kind):
    """It is the last layer's; the others could be changed."""
    run = Run(False)
    run.train(range(1))
    run.forward(1)
    (name, layer), make = list(run.decor._named_layers())[-1], UNWRITABLE[kind]
    if where == "R":
        layer.R = make[0](layer.R)
    else:
        run.decor.state[layer.R]["loss"] = make[0](run.decor.state[layer.R]["loss"])
    before = run.snapshot()
    with pytest.raises(RuntimeError, match=f"{where} of layer '{name}' cannot.*{make[1]}"):
        run.step()
    assert equal(run.snapshot(), before)


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("where", ["R", "W", "weight"])
def test_an_attached_step_finds_it_before_the_optimiser_steps(kind, where):
    run = Run(True)
    run.train(range(1))
    run.forward(1)
    site = list(run.handle._sites.values())[-1]
    made = UNWRITABLE[kind][0](getattr(site, where).detach())
    if where == "weight":
        site.weight.data = made
    else:
        setattr(site, where, made)
    before = run.snapshot()
    with pytest.raises(RuntimeError, match=rf"{where} of layer '{site.name}' cannot"):
        run.step()
    assert equal(run.snapshot(), before)


FORMS = pytest.mark.parametrize("attached", [False, True], ids=["layers", "attach"])
PLACES = {
    "in the middle of R's changes": (rules, "add_product_"),
    "after R has changed": (Gauge, "note"),
    "in the budget's bookkeeping": (Schedule, "choose"),
    "before A is formed": (Site, "form"),
}


@FORMS
@pytest.mark.parametrize("budget", [None, 0.3])
@pytest.mark.parametrize("how", ["error", "signal", "effect, then error"])
@pytest.mark.parametrize("where", PLACES)
def test_a_step_is_old_or_new(attached, budget, how, where, handlers, monkeypatch):
    options = {"budget": budget, "costs": "planned"}
    judge = Judge(lambda: Run(attached, options=options))
    owner, name = PLACES[where]
    real, calls = getattr(owner, name), []

    def failing(*arguments, **named):
        calls.append(name)
        if len(calls) > 1:
            return real(*arguments, **named)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments, **named)
        if how == "effect, then error":
            real(*arguments, **named)
        raise InjectedError

    run = judge.ready()
    with monkeypatch.context() as patch, caught(InjectedError, SystemExit) as errors:
        patch.setattr(owner, name, failing)
        run.step()
    assert bool(errors) == bool(calls)
    if not calls:
        assert (budget is None and "budget" in where) or (not attached and "A is" in where)
    assert judge.check(run)


@FORMS
def test_an_interrupt_under_a_budget_leaves_schedule_and_R_in_step(attached):
    """The schedule's step is that of the next one, as R's is, whenever the interrupt comes."""
    judge = Judge(lambda: Run(attached, options={"budget": 0.3, "costs": "planned"}))
    run = judge.ready()
    note = run.decor._guard.gauge(torch.device("cpu")).note
    run.decor._guard.gauge(torch.device("cpu")).note = lambda *a: (interrupt(), note(*a))
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert run.decor._steps == run.decor._budget.schedule.step == 2


def test_a_warning_that_is_an_error_leaves_nothing_half_done():
    """That a budget pays for nothing is told when the step is over."""
    net = dnn.DecorLinear(4, 2)
    decor = dbp.DecorUpdate(net, lr=1e-3, budget=1e-9)
    decor._budget._to_tell = "a warning"
    net(torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="a warning"):
            decor.step()
    assert decor._steps == decor._budget.schedule.step == 1
    assert not torch.equal(net.R, torch.eye(4))


@FORMS
@pytest.mark.parametrize("mode", MODES)
def test_errors_where_R_changes(attached, mode):
    """The last calls of a step, one by one, before and after each; all calls are a hostile suite's."""
    judge = Judge(lambda: Run(attached))
    run, counted = judge.ready(), mode(0, False)
    with counted:
        run.step()
    seen = set()
    for place in range(counted.calls * 2 // 3, counted.calls + 1, 5):
        run, error = judge.ready(), mode(place, place % 2 == 0)
        with pytest.raises(InjectedError), error:
            run.step()
        seen.add(judge.check(run, same_W=error.ours, goes_on=place % 4 == 0))
    assert seen == {False, True}
