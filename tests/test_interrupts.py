"""Ctrl-C: nothing that belongs together is left half done."""

import os
import signal
import threading

import pytest
import torch

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import rules
from dbp_kernels.interrupts import uninterrupted
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
