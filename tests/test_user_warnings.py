"""Warnings name the line of the user's that led to them, however deep they come from."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import user_warnings


def line_of(step) -> tuple[str, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    (one,) = [w for w in caught if "dbp" in str(w.message) or "optimiser" in str(w.message)]
    return one.filename, one.lineno


@pytest.mark.parametrize("closure", [False, True])
def test_a_written_weight_is_told_of_at_the_call_of_step(closure):
    net = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dbp.attach(net, optimizer)
    loss = lambda: net(torch.randn(4, 6)).square().mean()  # noqa: E731
    loss().backward()
    with torch.no_grad():
        net.weight.mul_(2)

    def again():
        result = loss()
        result.backward()
        return result

    def step():
        optimizer.step(again) if closure else optimizer.step()

    file, line = line_of(step)
    assert file == __file__
    assert line == step.__code__.co_firstlineno + 1


def test_a_plain_checkpoint_is_told_of_at_the_call_that_loads_it():
    net = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plain = optimizer.state_dict()
    dbp.attach(net, optimizer)
    load = lambda: optimizer.load_state_dict(plain)  # noqa: E731
    assert line_of(load) == (__file__, load.__code__.co_firstlineno)


def test_packages_whose_names_begin_like_torchs_are_not_torch():
    folder = str(Path(torch.__file__).parent)
    assert user_warnings._is_between(str(Path(folder, "optim", "sgd.py")))
    assert not user_warnings._is_between(str(Path(f"{folder}metrics", "metric.py")))
