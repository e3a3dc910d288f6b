"""Checkpoints and copies of a DecorUpdate: a run goes on bit for bit, and a bad one changes nothing."""

import copy
import io
import pickle

import pytest
import torch
from decor_layers import samples_of
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn


def train(net, optimiser, decor, data) -> None:
    for x in data:
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()
        decor.step()


def run(seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(dnn.DecorConv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), dnn.DecorLinear(27, 4))
    optimiser = torch.optim.Adam(net.parameters())
    decor = dbp.DecorUpdate(net, lr=1e-2, sample=0.3, sampling="random", update_every=2)
    return net, optimiser, decor


def test_state_dict_restores_a_run_bit_for_bit():
    data = torch.randn(9, 8, 2, 5, 5)
    net, optimiser, decor = run()
    schedule = torch.optim.lr_scheduler.ExponentialLR(decor, 0.9)
    bad = data[0].clone()
    bad[:] = float("inf")
    decor.step(lambda: net(bad))
    schedule.step()
    train(net, optimiser, decor, data[:4])
    buffer = io.BytesIO()
    torch.save([m.state_dict() for m in (net, optimiser, decor)], buffer)
    train(net, optimiser, decor, data[4:])

    net2, optimiser2, decor2 = run(seed=1)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for target, state in zip((net2, optimiser2, decor2), saved):
        target.load_state_dict(state)
    assert {k: int(v) for k, v in decor2.skipped().items()} == {"0": 1, "3": 1}
    assert all(v.dtype == torch.int64 for v in decor2.skipped().values())
    train(net2, optimiser2, decor2, data[4:])
    for a, b in zip(net.state_dict().values(), net2.state_dict().values()):
        assert torch.equal(a, b)
    for a, b in zip(decor.losses().values(), decor2.losses().values()):
        assert torch.equal(a, b)
    assert decor2.param_groups[0]["lr"] == decor.param_groups[0]["lr"]


def test_bad_state_dicts():
    _, _, decor = run()
    before = decor.state_dict()
    with pytest.raises(ValueError, match="generator"):
        decor.load_state_dict({"state": {}, "param_groups": []})
    other = dbp.DecorUpdate(dnn.DecorLinear(3, 2)).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[1\] layers"):
        decor.load_state_dict(other)
    after = decor.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after


def broken_state(state: dict, what: str) -> dict:
    """A good state_dict with another learning rate and step, and one thing wrong."""
    state = copy.deepcopy(state)
    state["steps"] += 1
    state["param_groups"][0]["lr"] = 0.5
    if what == "generator":
        state["generator"] = state["generator"][:7]
    elif what == "generator=None":
        state["generator"] = None
    elif what == "steps":
        state["steps"] = -1
    elif what == "kappa":
        state["param_groups"][0]["kappa"] = 2.0
    elif what == "demean":
        del state["param_groups"][0]["demean"]
    elif what == "skipped":
        del state["state"][1]["skipped"]
    elif what == "layers":
        state["param_groups"][0]["params"].pop()
    elif what == "param_groups":
        state["param_groups"] = None
    elif what == "steps=True":
        state["steps"] = True
    elif what == "skipped=-1":
        state["state"][1]["skipped"] = torch.tensor(-1)
    elif what == "clipped=True":
        state["state"][1]["clipped"] = torch.tensor(True)
    elif what == "loss=nothing":
        state["state"][1]["loss"] = torch.ones((), device="meta")
    elif what == r"state\[7\]":
        state["state"][7] = state["state"].pop(1)
    elif what == "another model":
        state["param_groups"][0]["param_names"] = ["0", "head"]
    elif what == "lr":
        state["param_groups"][0]["lr"] = 10**400
    elif what == "initial_lr":
        state["param_groups"][0]["initial_lr"] = "large"
    elif what == "rule":
        state["param_groups"][0]["rule"] = ["standard"]
    return state


@pytest.mark.parametrize(
    "what",
    [
        "generator",
        "generator=None",
        "steps",
        "kappa",
        "demean",
        "skipped",
        "layers",
        "param_groups",
        "steps=True",
        "skipped=-1",
        "clipped=True",
        "loss=nothing",
        r"state\[7\]",
        "another model",
        "lr",
        "initial_lr",
        "rule",
    ],
)
def test_a_bad_state_dict_changes_nothing(what):
    net, optimiser, decor = run()
    train(net, optimiser, decor, torch.randn(3, 8, 2, 5, 5))
    before = copy.deepcopy(decor.state_dict())
    net(torch.randn(8, 2, 5, 5))
    with pytest.raises(ValueError, match=what.split("=")[0]):
        decor.load_state_dict(broken_state(before, what))
    after = decor.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert before["steps"] == after["steps"]
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(value, after["state"][index][key], equal_nan=True)


def test_a_model_may_be_part_of_another_when_it_is_loaded():
    net, optimiser, decor = run()
    train(net, optimiser, decor, torch.randn(3, 8, 2, 5, 5))
    outer = nn.ModuleDict({"body": copy.deepcopy(net)})
    other = dbp.DecorUpdate(outer)
    other.load_state_dict(decor.state_dict())
    assert other.losses().keys() == {"body.0", "body.3"}
    decor.load_state_dict(other.state_dict())


def test_two_layers_with_one_R_are_refused():
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 3))
    own = net[1].R
    net[1].R = net[0].R
    with pytest.raises(ValueError, match="layers '0' and '1' have one R"):
        dbp.DecorUpdate(net)
    net[1].R = own
    decor = dbp.DecorUpdate(net, lr=0.1)
    params = list(decor.param_groups[0]["params"])
    net[1].R = net[0].R[:]  # the same memory
    net(torch.randn(8, 3))
    with pytest.raises(ValueError, match="layers '0' and '1' have one R"):
        decor.step()
    assert all(a is b for a, b in zip(decor.param_groups[0]["params"], params))
    assert torch.equal(net[0].R, torch.eye(3))


@pytest.mark.parametrize(
    ("R", "error", "message"),
    [
        (None, TypeError, "R of layer '0' is a NoneType"),
        (torch.eye(4), ValueError, r"R of layer '0' of shape \(4, 4\): expected \(3, 3\)"),
        (torch.eye(3, dtype=torch.int64), TypeError, "R of layer '0' has dtype torch.int64"),
    ],
)
def test_what_a_layers_R_was_set_to_is_refused_by_name(R, error, message):
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 3))
    decor = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    net(torch.randn(8, 3))
    net[0].R = R
    for call in (decor.step, decor.losses, decor.state_dict, lambda: dbp.DecorUpdate(net)):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(net[1].R, torch.eye(3))


def test_reports_and_state_dicts_are_snapshots():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0)
    layer(torch.randn(4, 3))
    update.step()
    taken = update.losses()["DecorLinear"], update.state_dict()["state"][0]["loss"]
    value = taken[0].clone()
    saved = update.state_dict()
    update.load_state_dict(saved)
    layer(torch.randn(4, 3) * 9)
    update.step()
    assert [bool(t == value) for t in taken] == [True, True]
    assert saved["state"][0]["loss"] == value
    assert update.losses()["DecorLinear"] != value
    state = update.state[layer.R]
    inside = dict(state)
    layer(torch.randn(4, 3))
    update.step()
    assert all(state[key] is inside[key] for key in inside)  # written in place


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_together_with_the_model(copier):
    data = torch.randn(6, 8, 2, 5, 5)
    net, optimiser, decor = run()
    train(net, optimiser, decor, data[:3])
    net(data[0])
    net2, decor2 = copier((net, decor))
    decor.discard()
    assert samples_of(decor2) == [[], []]
    for model, update in ((net, decor), (net2, decor2)):
        for x in data[3:]:
            model(x)
            update.step()
    for a, b in zip(net.state_dict().values(), net2.state_dict().values()):
        assert torch.equal(a, b)
    assert net2[0].R is not net[0].R
    assert decor2.param_groups[0]["params"][0] is net2[0].R
