"""Which DecorUpdate a layer belongs to, and for how long."""

import gc
import weakref

import pytest
import torch
from decor_layers import D64, expected, samples_of
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn


def test_a_dropped_optimiser_stops_the_copies_at_once():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    layer(torch.randn(4, 3))
    sample = weakref.ref(samples_of(update)[0][0])
    gc.disable()
    try:
        del update
        assert sample() is None
        layer(torch.randn(4, 3))
    finally:
        gc.enable()


def test_detach():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    layer(torch.randn(4, 3))
    update.detach()
    assert samples_of(update) == [[]]
    assert layer._recorder is None
    layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    with pytest.raises(RuntimeError, match=r"DecorLinear.*no longer belongs"):
        update.step()
    update.close()


def test_a_second_optimiser_takes_the_layer_over():
    layer = dnn.DecorLinear(3, 2)
    first = dbp.DecorUpdate(layer, lr=0.1)
    second = dbp.DecorUpdate(layer, lr=0.1)
    layer(torch.randn(4, 3))
    assert samples_of(first) == [[]]
    with pytest.raises(RuntimeError, match="later DecorUpdate"):
        first.step()
    first.detach()
    second.step()
    assert not torch.equal(layer.R, torch.eye(3))


def test_it_follows_the_model_to_another_dtype():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    layer(torch.randn(4, 3))
    update.step()
    losses = update.losses()
    layer.double()
    assert update.losses().keys() == losses.keys()
    R = layer.R.clone()
    x = torch.randn(4, 3, dtype=D64)
    layer(x)
    update.step()
    torch.testing.assert_close(layer.R, expected(x[None, :1], R, 0.1, 0.5)[0])
    assert update.param_groups[0]["params"][0] is layer.R
    assert len(update.state) == 1


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (dbp.fuse_model, "it was fused"),
        (lambda net: dbp.DecorUpdate(net), "a later DecorUpdate"),
        (lambda net: net[1]._recorder().release(), "it was detached"),
    ],
    ids=["fused", "taken over", "detached"],
)
def test_step_says_why_a_layer_is_no_longer_its_own(lose, why):
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2))
    update = dbp.DecorUpdate(net)
    kept = lose(net)
    with pytest.raises(RuntimeError, match=f"no longer belongs to this DecorUpdate: {why}"):
        update.step()
    del kept


@pytest.mark.parametrize("accessor", ["losses", "skipped", "state_dict"])
def test_accessors_after_a_fuse_name_the_cause(accessor):
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2))
    update = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(4, 3))
    update.step()
    saved = update.state_dict()
    dbp.fuse_model(net)
    with pytest.raises(RuntimeError, match=r"layer '0' has no R: it was fused"):
        getattr(update, accessor)()
    with pytest.raises(RuntimeError, match=r"layer '0' has no R: it was fused"):
        update.load_state_dict(saved)
    update.detach()
    assert "2 layers" in repr(update)
