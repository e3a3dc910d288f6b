"""Whatever is fed, and whatever raises: every R stays finite, or as it was."""

import random

import pytest
import torch
from decor_layers import samples_of
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels.optim import write_back


@pytest.mark.parametrize("size", [3, 300])  # a large R is changed in place
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_batch_is_skipped_and_counted(bad, size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, 2))
    update = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
    net(torch.randn(4, size))
    update.step()
    before = [m.R.clone() for m in net]
    x = torch.randn(4, size)
    x[1, 2] = bad
    net[0](x)
    net[1](torch.randn(4, size))
    update.step()
    assert torch.equal(net[0].R, before[0])
    assert not torch.equal(net[1].R, before[1])
    assert {k: int(v) for k, v in update.skipped().items()} == {"0": 1, "1": 0}
    assert not update.losses()["0"].isfinite()
    assert update.losses()["1"].isfinite()
    net(torch.randn(4, size))
    update.step()
    assert not torch.equal(net[0].R, before[0])
    assert update.losses()["0"].isfinite()
    assert net[0].R.isfinite().all()
    assert int(update.skipped()["0"]) == 1


@pytest.mark.parametrize("size", [3, 300])
def test_an_error_leaves_every_R_as_it_was(size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, 2))
    update = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(4, size))
    samples_of(update)[1][0] = torch.randn(4, 7)  # what a broken backend would meet
    with pytest.raises((RuntimeError, ValueError)):
        update.step()
    assert all(torch.equal(m.R, torch.eye(size)) for m in net)
    assert samples_of(update) == [[], []]
    assert update._steps == 0


@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
def test_a_step_size_beyond_all_numbers_is_skipped(images):
    """Statistics, loss and M' R are finite, but not their product with it."""
    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=1e36, sample=1.0)
    layer(30 * torch.randn(images, 300))
    update.step()
    assert [int(v) for v in update.skipped().values()] == [1]
    assert torch.equal(layer.R, torch.eye(300))


HOSTILE = [float("nan"), float("inf"), -float("inf"), 1e38, 1e25, 1e18, 1e-18, 1e-38]


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
@pytest.mark.parametrize("size", [3, 300], ids=["R_new", "in place"])
def test_whatever_is_fed_R_stays_finite_or_as_it_was(size, images, on_host, monkeypatch):
    """One entry, or all, of the samples or of R, and the step size, are anything there is."""
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    feed_anything(size, images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
@pytest.mark.parametrize("size", [3, 300])
def test_whatever_is_fed_on_a_device(size, images):
    feed_anything(size, images, "cuda")


def feed_anything(size: int, images: int, device: str = "cpu") -> None:
    cases = [
        (value, where, everywhere, lr, kappa, rule)
        for value in HOSTILE
        for where in ("x", "R")
        for everywhere in (False, True)
        for lr in (1e-3, 1e20, 1e38)
        for kappa in (0.0, 0.5, 1.0)
        for rule in ("standard", "normalized")
        if where == "x" or abs(value) <= 1e30  # R is far from the largest number, or is no number
    ]
    outcomes = set()
    for value, where, everywhere, lr, kappa, rule in random.Random(0).sample(cases, 60):
        layer = dnn.DecorLinear(size, 2, device=device)
        update = dbp.DecorUpdate(layer, lr=lr, kappa=kappa, rule=rule, sample=1.0)
        x = torch.randn(images, size, device=device)
        (x if where == "x" else layer.R)[... if everywhere else (1, 2)] = value
        layer(x)
        before = layer.R.clone()
        update.step()
        (skipped,), (loss,) = update.skipped().values(), update.losses().values()
        same = torch.equal(layer.R.nan_to_num(7.0), before.nan_to_num(7.0))
        assert same if skipped else layer.R.isfinite().all() and loss.isfinite()
        outcomes.add((int(skipped), same))
    assert {(0, False), (1, True)} <= outcomes


@pytest.mark.parametrize("size", [3, 300])
def test_options_set_by_hand_are_checked_by_step(size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, size))
    update = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    update.param_groups[0]["lr"] = -0.1
    net(torch.randn(4, size))
    with pytest.raises(ValueError, match=r"lr=-0\.1"):
        update.step()
    update.param_groups[0]["lr"] = 0.1
    net[1].R = net[1].R.half()
    net[0](torch.randn(4, size))
    net[1](torch.randn(4, size))
    with pytest.raises(TypeError, match=r"R has dtype torch\.float16"):
        update.step()
    assert torch.equal(net[0].R, torch.eye(size))
