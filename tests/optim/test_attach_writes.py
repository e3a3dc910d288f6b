"""Weights that are written from outside: they stay, and W follows."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from attach_forms import (
    LAYERS,
    OPTIONS,
    A_of,
    batches,
    make,
    train,
    trained,
)
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.optim.kinds import Patches
from dbp_kernels.optim.site import PROBED, Site


def test_an_equal_reload_changes_nothing():
    form, other = trained(4), trained(4)
    form.model.load_state_dict(copy.deepcopy(form.model.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(form, 1, seed=9)
    train(other, 1, seed=9)
    for name in LAYERS:
        assert all(map(torch.equal, form.of(name), other.of(name)))


def test_a_write_from_outside_stays_and_W_follows():
    form = trained(4, lr=3e-2)
    best = make()
    form.model.load_state_dict(best.state_dict())
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    for group in form.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    with pytest.warns(UserWarning, match="'depthwise' and 4 more layers were changed"):
        form.optimizer.step()
    for name in LAYERS:
        R, W = form.decor.R(name), form.decor.W(name)
        assert not torch.equal(R, torch.eye(R.shape[-1], dtype=R.dtype))
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))
        assert not torch.allclose(W, best.get_submodule(name).weight, atol=1e-4)
    form.decor._engine.discard()
    frozen = trained(4, lr=3e-2)
    frozen.model.load_state_dict(best.state_dict())
    for group in frozen.decor._engine.param_groups:
        group["lr"] = 0.0
    for group in frozen.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    F.cross_entropy(frozen.model(x), y).backward()
    with pytest.warns(UserWarning, match="were changed outside"):
        frozen.optimizer.step()
    for name in LAYERS:  # neither W nor R has moved: the function is the one that was loaded
        weight = frozen.model.get_submodule(name).weight
        torch.testing.assert_close(weight, best.get_submodule(name).weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "write",
    [lambda data: data.mul_(2), lambda data: data.clamp_(-0.1, 0.1), lambda data: data.zero_()],
    ids=["mul_", "clamp_", "zero_"],
)
def test_a_write_through_data_is_noticed_on_cpus(write):
    """Which raises no version counter."""
    form = trained(4, lr=3e-2)
    weight = form.model.first.weight
    write(weight.data)
    kept = weight.detach().clone()
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    for groups in (form.optimizer.param_groups, form.decor._engine.param_groups):
        for group in groups:
            group.update(lr=0.0, weight_decay=0.0)
    with pytest.warns(UserWarning, match="weights of 'first' were changed"):
        form.optimizer.step()
    torch.testing.assert_close(weight.detach(), kept, rtol=0, atol=1e-12)
    assert torch.equal(weight, A_of(form, "first"))


def test_weights_that_are_not_numbers_are_not_taken_for_written():
    form = trained(1, optimizer="sgd")
    form.model.first.weight.grad = torch.full_like(form.model.first.weight, torch.nan)
    form.optimizer.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed outside")
        train(form, 2)
    assert form.model.first.weight.isnan().all()


@pytest.mark.parametrize("shape", [(40, 30), (64, 64), (5, 8, 3, 3), (3, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_row_and_column_is_looked_at(shape, transposed):
    """In whatever order the weight's memory is."""
    weight = torch.zeros(shape)
    if transposed:
        weight = weight.movedim(0, -1).contiguous().movedim(-1, 0)
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(weight)
    site = Site("layer", layer, Patches(1))
    assert len(site._probed) <= PROBED
    for dim, size in enumerate(shape):
        for place in range(size):
            layer.weight.data.zero_()
            site.formed()
            assert site._untouched()
            layer.weight.data.select(dim, place).fill_(1)
            assert not site._untouched()


@pytest.mark.parametrize("rests", [False, True])
def test_a_write_is_not_lost_when_the_step_of_another_optimiser_ends_the_round(rests):
    """As where a critic's weights are clamped after its step, and the generator's step follows."""
    model = make()
    critic = list(model.head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    own, other = (torch.optim.SGD(parameters, lr=0.1) for parameters in (critic, rest))
    decor = dbp.attach(model, [own, other], **OPTIONS)
    data = batches(6)

    def step(*optimizers):
        x, y = next(data)
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            if optimizer is own:
                with torch.no_grad():
                    model.head.weight.clamp_(-0.05, 0.05)
        model.zero_grad()

    warnings.simplefilter("ignore")
    for _ in range(2):
        step(own, other)
    if rests:
        step(other)
        with torch.no_grad():
            model.head.weight.clamp_(-0.01, 0.01)
    for group in decor._engine.param_groups:
        group["lr"] = 0.0
    before = model.head.weight.detach().clone()
    with (
        pytest.warns(UserWarning, match="weights of 'head' were changed")
        if rests
        else nullcontext()
    ):
        step(*([] if rests else [own]), other)
    if rests:
        torch.testing.assert_close(model.head.weight.detach(), before, rtol=0, atol=1e-12)
    else:
        assert model.head.weight.abs().max() <= 0.05 + 1e-12


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_may_be_moved_and_replaced(value):
    form = trained(2)
    weight = form.model.head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    x, y = next(batches(1))
    for groups in (form.optimizer.param_groups, form.decor._engine.param_groups):
        for group in groups:
            group.update(lr=0.0, weight_decay=0.0)
    with pytest.warns(UserWarning, match="weights of 'head' were changed"):
        form.optimizer.step()
    weight.data = weight.data.clone()
    form.optimizer.step()
    with torch.no_grad():
        weight.copy_(kept)
    F.cross_entropy(form.model(x), y).backward()
    with pytest.warns(UserWarning, match="weights of 'head' were changed"):
        form.optimizer.step()
    torch.testing.assert_close(weight.detach(), kept, rtol=0, atol=1e-12)
