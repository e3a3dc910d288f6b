"""Layers that get a gradient while their input is not seen: one warning names the cause and the remedy."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_training import (
    OPTIMIZERS,
    OPTIONS,
    attached,
    batches,
    everything,
    make_model,
    train,
    trained,
)
from torch import nn

import dbp_kernels as dbp


def identity(R):
    return torch.equal(R, torch.eye(len(R)))


def test_a_model_compiled_and_called_before_attach():
    """torch.compile does not look at hooks that come after the first call."""
    torch.compiler.reset()
    model = make_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ((x, _),) = batches(0, 1)
    compiled(x)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    decor = dbp.attach(model, optimizer, **OPTIONS)
    with pytest.warns(UserWarning, match=r"'0', '3' .*torch\.compiler\.reset\(\)") as caught:
        train(compiled, optimizer, 0, 2)
    assert len(caught) == 1
    assert identity(decor.R("0"))
    torch.compiler.reset()
    train(compiled, optimizer, 2, 5)
    assert not identity(decor.R("0"))
    assert not identity(decor.R("3"))


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.first(x), self.second.weight)


def test_a_layer_whose_weight_is_used_without_calling_it():
    model = Uncalled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dbp.attach(model, optimizer)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.warns(UserWarning, match="^'second' got a gradient.*without calling the layer"):
        optimizer.step()
    model(torch.randn(3, 4)).sum().backward()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        optimizer.step()


def quiet(model, optimizer, steps=2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 0, steps)


def test_nothing_is_said_where_nothing_is_to_be_sampled():
    """Layers in eval mode, at a rate of 0, not due, without a gradient, and a model seen before."""
    model, optimizer, _ = attached()
    model.eval()
    quiet(model, optimizer)
    quiet(*attached(lr=0.0)[:2])
    quiet(*attached(update_every=3, stagger=True)[:2], steps=5)
    quiet(*attached(budget=0.2, costs="planned", update_every=1)[:2], steps=8)
    model, optimizer, _ = attached()
    model[0].requires_grad_(False)
    quiet(model, optimizer)
    model, optimizer, _ = trained(1)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_model_compiled_before_but_called_after_attach_is_seen():
    torch.compiler.reset()
    model = make_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    torch.manual_seed(2)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    quiet(compiled, optimizer, 3)
    model, _, eager = trained(3)
    torch.testing.assert_close(everything(compiled._orig_mod, decor), everything(model, eager))
