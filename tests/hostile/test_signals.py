"""Signals at random times within a step: their handlers raise, and nothing is left half done."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from faults import Judge, Run, caught

SIGNALS = {
    "SIGINT": KeyboardInterrupt,
    "SIGTERM": SystemExit,
    "SIGALRM": TimeoutError,
    "SIGUSR1": RuntimeError,
}
BUDGET = {"budget": 0.3, "costs": "planned"}
RUNS = {
    "layers": lambda: Run(False),
    "layers, budget": lambda: Run(False, options=BUDGET),
    "attach": lambda: Run(True),
    "attach, budget": lambda: Run(True, options=BUDGET),
}


@pytest.fixture
def handlers():
    """One that raises for each of the signals."""

    def raising(error):
        def handler(number, frame):
            raise error(f"signal {number}")

        return handler

    made = {getattr(signal, name): raising(error) for name, error in SIGNALS.items()}
    before = {number: signal.signal(number, handler) for number, handler in made.items()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # else a step is over before the thread that sends has its turn
    yield made
    sys.setswitchinterval(interval)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number, ways, delay):
    """Have a signal come after so many seconds, in one of the ways that there are."""
    if number == signal.SIGALRM:
        signal.setitimer(signal.ITIMER_REAL, delay)
        return
    main = threading.get_ident()

    def work():
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            time.sleep(0)  # a sleep would be longer than the step
        if ways == "kill":
            os.kill(os.getpid(), number)
        else:
            signal.pthread_kill(main, number)

    threading.Thread(target=work).start()


def seconds(run):
    began = time.perf_counter()
    run.step()
    return time.perf_counter() - began


@pytest.mark.kind("signals")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("which", SIGNALS)
def test_signals_at_random_times(which, name, handlers, campaign):
    """75 each for the four forms: 300 of every signal."""
    number, judge = getattr(signal, which), Judge(RUNS[name])
    usual, seen = min(seconds(judge.ready()) for _ in range(5)), set()
    for random in campaign.cases(75):
        run = judge.ready()
        # most of them in the second half, where R changes
        delay = max(1e-6, usual * random.choice([random.uniform(0, 1.1), random.uniform(0.5, 1)]))
        with caught(SIGNALS[which]) as errors:
            send(number, random.choice(["kill", "pthread_kill"]), delay)
            run.step()
            for _ in range(6000):  # it is late, and ends this
                time.sleep(0.01)  # not all at once: another thread may be given the signal
        assert len(errors) == 1
        # torch's own no_grad() does not survive a signal at its end, nor would any program that uses it
        torch.set_grad_enabled(True)
        assert {n: signal.getsignal(n) for n in handlers} == handlers
        # torch's own optimiser may have been left anywhere
        seen.add(judge.check(run, same_W=False, goes_on=random.random() < 0.2))
    assert seen == {False, True}
