"""Samples are in the dtype that autocast has the layer compute in."""

import copy

import pytest
import torch
from decor_layers import D64, LAYERS, samples_of
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_samples_are_what_autocast_has_the_layer_compute_with(layer, shape):
    layer = copy.deepcopy(layer)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(shape)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        with torch.autocast("cpu", enabled=False):
            layer(x)
    with torch.autocast("cpu", torch.float16):
        layer(x)
    (samples,) = samples_of(update)
    for sample, expected in zip(samples, (x, x.bfloat16(), x, x.half()), strict=True):
        assert sample.dtype == expected.dtype
        assert torch.equal(sample.reshape(shape), expected)


def test_random_samples_are_too():
    layer = dnn.DecorLinear(5, 4)
    update = dbp.DecorUpdate(layer, sample=4, sampling="random")
    x = torch.randn(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    ((sample,),) = samples_of(update)
    assert sample.dtype == torch.bfloat16
    assert set(map(tuple, sample.tolist())) < set(map(tuple, x.bfloat16().tolist()))


def test_autocast_leaves_samples_of_float64_alone():
    layer = dnn.DecorLinear(5, 4, dtype=D64)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(8, 5, dtype=D64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(samples_of(update)[0][0], x)


def test_samples_in_half_precision_are_copies():
    layer = dnn.DecorLinear(5, 4)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(8, 5, dtype=torch.bfloat16)
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    x.zero_()
    assert torch.equal(samples_of(update)[0][0], before)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_samples_under_autocast_of_compiled_code(inside):
    net = nn.Sequential(dnn.DecorConv2d(2, 4, 3), nn.Flatten(), dnn.DecorLinear(4, 3))
    update = dbp.DecorUpdate(net, lr=1e-2, sample=1.0)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    x = torch.randn(8, 2, 3, 3)
    if inside:
        torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    first, second = samples_of(update)
    assert first[0].dtype == second[0].dtype == torch.bfloat16
    assert torch.equal(first[0], x.bfloat16())
    update.step()
    assert not torch.equal(net[0].R, torch.eye(18))
