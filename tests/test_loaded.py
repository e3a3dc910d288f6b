"""What no R is: refused by every way to load one, by its layer's name, before anything changes."""

import copy

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels.loaded import MAX_NORM, why_no_R


def changed(entry, value, dtype=torch.float32):
    R = torch.eye(18, dtype=dtype)
    R[3, entry] = value
    return R


WRONG = {
    "nan": (changed(5, torch.nan), "not finite"),
    "inf": (changed(5, -torch.inf), "not finite"),
    "absurd": (
        changed(5, 1e30),
        r"entries up to 1e\+30: expected rows of a norm of at most 4.29e\+09",
    ),
    "absurd in float64": (changed(5, -1e30, torch.float64), r"entries up to 1e\+30"),
    "shape": (torch.eye(4), r"of shape \(4, 4\): expected \(18, 18\)"),
    "integers": (torch.eye(18, dtype=torch.int64), "dtype torch.int64"),
    "complex": (torch.eye(18, dtype=torch.complex64), "dtype torch.complex64"),
    "sparse": (torch.eye(18).to_sparse(), "layout torch.sparse_coo"),
    "zeros": (torch.zeros(18, 18), "a row of zeros"),
}


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 4))


def decorrelated():
    net = dbp.decorrelate_model(layers())
    for module in net.modules():
        if dnn.is_decorrelated(module):
            module.R += 0.01 * torch.randn_like(module.R)
    return net


def state_with(R, key="0.R"):
    state = {name: value + 1 for name, value in decorrelated().state_dict().items()}
    return {**state, key: R}


def test_the_bound_is_where_a_loss_overflows():
    row = torch.tensor(MAX_NORM)
    assert row.pow(4).isinf()
    assert (row * (1 - 2.0**-20)).pow(4).isfinite()
    assert why_no_R(MAX_NORM * torch.eye(2), (2, 2)) is None
    assert why_no_R(1.001 * MAX_NORM * torch.eye(2), (2, 2)) is not None


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("strict", [True, False])
def test_a_models_load_state_dict_is_all_or_nothing(what, strict):
    R, message = WRONG[what]
    net = decorrelated()
    before = copy.deepcopy(net.state_dict())
    # the layer before the one that is wrong, and the one behind it, stay as they were
    with pytest.raises(ValueError, match=rf"0\.R.*{message}"):
        net.load_state_dict(state_with(R), strict=strict)
    last = torch.eye(27)
    last[2] = torch.nan
    with pytest.raises(RuntimeError, match=r"2\.R.*not finite"):
        net.load_state_dict(state_with(last, "2.R"), strict=strict)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: nn.Sequential(net)])
def test_copies_and_larger_models_are_all_or_nothing_too(copied):
    net = copied(decorrelated())
    before = copy.deepcopy(net.state_dict())
    state = {name: value + 1 for name, value in before.items()}
    name = next(name for name in state if name.endswith("2.R"))
    state[name][0, 0] = torch.nan
    with pytest.raises(ValueError, match=name):
        net.load_state_dict(state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_layers_placed_by_hand_refuse_for_themselves_and_all_once_they_learn():
    net = nn.Sequential(dnn.DecorLinear(3, 4), dnn.DecorLinear(4, 2))
    state = {name: value + 1 for name, value in net.state_dict().items()}
    state["1.R"][0, 0] = torch.inf
    weight = net[1].weight.clone()
    with pytest.raises(ValueError, match=r"1\.R"):
        net.load_state_dict(state)
    assert torch.equal(net[1].weight, weight)
    dbp.DecorUpdate(net)
    before = copy.deepcopy(net.state_dict())
    state = {name: value + 1 for name, value in state.items()}
    with pytest.raises(ValueError, match=r"1\.R"):
        net.load_state_dict(state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_a_fused_model_keeps_nothing_of_ours():
    net = decorrelated()
    assert net._load_state_dict_pre_hooks
    dbp.decorrelate_model(net)
    assert len(net._load_state_dict_pre_hooks) == 1
    assert not dbp.fuse_model(net)._load_state_dict_pre_hooks


@pytest.mark.parametrize("what", WRONG)
def test_load_decorrelated_and_fuse_state_dict_refuse_it(what):
    R, message = WRONG[what]
    net = layers()
    before = copy.deepcopy(net.state_dict())
    state = state_with(R)
    with pytest.raises(ValueError, match=rf"0\.R.*{message}"):
        dbp.load_decorrelated(net, state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert type(net[0]) is nn.Conv2d
    with pytest.raises(ValueError, match=r"0\.R"):
        dbp.fuse_state_dict(state, net)


def test_a_layer_without_R_says_so():
    net = decorrelated()
    net[0].R = None
    with pytest.raises(TypeError, match="R is a NoneType: expected a Tensor"):
        net(torch.randn(2, 2, 5, 5))
    with pytest.raises(TypeError, match="R of layer '0' is a NoneType"):
        dbp.DecorUpdate(net)
    assert "R=None" in repr(net.double())
