"""Layers of equal shape and options are updated together, and as if alone."""

import copy

import pytest
import torch
from decor_layers import D64, LAYERS, expected
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dbp_kernels as dbp
from dbp_kernels import backends, rules
from dbp_kernels import nn as dnn
from dbp_kernels.optim import step as jobs_module


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._schema.name.split("::")[1].rstrip("_") in ("bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def equal_layers(make, count: int) -> nn.ModuleList:
    layers = nn.ModuleList([make() for _ in range(count)]).to(D64)
    for layer in layers:
        layer.R.add_(torch.randn_like(layer.R) * 0.1)
    return layers


@pytest.mark.parametrize("images", [4, 400])  # few samples and many: other plans
def test_equal_layers_share_their_products(images):
    counts = []
    for layers in (3, 12):
        net = equal_layers(lambda: dnn.DecorLinear(32, 32), layers)
        update = dbp.DecorUpdate(net, lr=1e-2, sample=1.0)
        for layer in net:
            layer(torch.randn(images, 32, dtype=D64))
        with Products() as products:
            update.step()
        counts.append(products.calls)
    assert counts[0] == counts[1] <= 6


@pytest.mark.parametrize("options", [{}, {"rule": "normalized", "kappa": 0.3, "demean": True}])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("batch", [1, 8])
def test_layers_together_equal_layers_alone(layer, shape, batch, options, monkeypatch):
    net = equal_layers(lambda: copy.deepcopy(layer), 3)
    alone = copy.deepcopy(net)
    xs = [torch.randn(batch, *shape[1:], dtype=D64) + 0.3 for _ in net]
    updates, together = [], []
    original = jobs_module._update_together
    monkeypatch.setattr(
        jobs_module, "_update_together", lambda *a: together.append(a) or original(*a)
    )
    for model, small in ((net, 256), (alone, 0)):
        limits = dict.fromkeys(("gram", "direct", "samples"), small)
        monkeypatch.setattr(jobs_module, "_SMALL", limits)
        updates.append(dbp.DecorUpdate(model, lr=1e-2, sample=1.0, **options))
        for m, x in zip(model, xs):
            m(x)
        updates[-1].step()
    assert len(together) == 1
    for a, b in zip(net, alone):
        torch.testing.assert_close(a.R, b.R, rtol=1e-12, atol=1e-12)
    for name, loss in updates[0].losses().items():
        torch.testing.assert_close(loss, updates[1].losses()[name], rtol=1e-10, atol=1e-12)


def test_only_equal_layers_go_together():
    """Each has a neighbour of another option, dtype, size or number of samples."""
    make = dnn.DecorLinear
    net = nn.ModuleList([make(4, 2), make(4, 3), make(5, 2), make(4, 2), make(4, 2, dtype=D64)])
    groups = [{"modules": [("a", net[0])], "kappa": 0.1}, {"modules": net[1:]}]
    update = dbp.DecorUpdate(groups, lr=0.1, sample=1.0, clip=None)
    xs = [torch.randn(6 if i == 3 else 2, m.in_features).to(m.R) for i, m in enumerate(net)]
    for layer, x in zip(net, xs):
        layer(x)
    net[4](xs[4])
    update.step()
    for i, (layer, x) in enumerate(zip(net, xs)):
        R, _ = expected(x[None], torch.eye(len(layer.R)), 0.1, 0.5 if i else 0.1)
        torch.testing.assert_close(layer.R, R.to(layer.R.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "name"), [(200_000, "gram_update"), (6, "direct_update")])
def test_the_selected_backend_gets_equal_layers_together(rows, name, monkeypatch):
    batches = []

    def spy(Z, R, *rest, **rule):
        batches.append(R.shape)
        return getattr(rules, name)(Z, R, *rest, **rule)

    net = equal_layers(lambda: dnn.DecorLinear(4, 4), 3)
    update = dbp.DecorUpdate(net, sample=1.0)
    for layer in net:
        layer(torch.randn(rows, 4, dtype=D64))
    monkeypatch.setattr(backends.select("cpu"), name, spy)
    update.step()
    assert batches == [(3, 4, 4)]
