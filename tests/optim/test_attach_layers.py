"""What is attached, what is left alone and why, and each layer's options."""

import gc

import pytest
import torch
import torch.nn.functional as F
from attach_forms import batches, make, train, trained
from torch import nn

import dbp_kernels as dbp


def test_what_is_left_alone_and_why():
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 300), nn.Linear(300, 9, bias=False)
    )
    model[3].weight = nn.Parameter(model[3].weight.detach())
    tied = nn.Linear(4, 9)
    tied.weight = model[0].weight
    model.append(tied)
    outside = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.append(outside)
    decor = dbp.attach(model, optimizer, exclude="1", max_size=200)
    assert list(decor.decorrelated()) == ["2"]
    assert decor.left_alone() == {
        "0": "Embedding is no kind that dbp.register knows",
        "1": "among exclude",
        "3": "its R would have 300 > max_size=200 rows, 0 MiB",
        "4": "its weight is that of '0' too",
        "5": "its weight is not in the optimiser",
    }
    assert "left alone:\n  0: Embedding" in repr(decor)


def test_groups_have_options_of_their_own():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2, groups=[{"modules": "head", "lr": 0.0}])
    x, y = next(batches(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert torch.equal(decor.R("head"), torch.eye(7, dtype=torch.float64))
    assert not torch.equal(decor.R("line"), torch.eye(36, dtype=torch.float64))


def test_a_frozen_weight_keeps_its_R():
    form = trained()
    form.model.tokens.requires_grad_(False)
    before = form.decor.R("tokens").clone(), form.model.tokens.weight.detach().clone()
    train(form, 2, seed=3)
    assert torch.equal(form.decor.R("tokens"), before[0])
    torch.testing.assert_close(form.model.tokens.weight, before[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m, o: (m, [o], {"lr": -1}), ValueError, "lr=-1"),
        (lambda m, o: (m, 3, {}), TypeError, "optimizer=3"),
        (lambda m, o: (m, [], {}), ValueError, "at least one"),
        (lambda m, o: (m.parameters(), o, {}), TypeError, "model must be"),
        (lambda m, o: (m, o, {"include": "nothing"}), ValueError, "include='nothing'"),
        (lambda m, o: (m, o, {"exclude": "*"}), ValueError, "found no layer"),
        (lambda m, o: (dbp.decorrelate_model(m), o, {}), ValueError, "decorrelated layer 'first'"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizers, options = arguments(model, optimizer)
    with pytest.raises(error, match=message):
        dbp.attach(model, optimizers, **options)
    assert not optimizer._optimizer_step_pre_hooks
    assert "step" not in optimizer.__dict__


def test_attaching_twice_is_an_error():
    form = trained(1)
    with pytest.raises(ValueError, match="'first' is attached already"):
        dbp.attach(form.model, form.optimizer)


def test_an_optimiser_is_attached_once():
    """Its state could hold only one handle's W and R."""
    first, second = make(), make()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    decor = dbp.attach(first, optimizer, include="head")
    for model, chosen in ((second, None), (first, "first")):
        with pytest.raises(ValueError, match=r"attached already.*ModuleList"):
            dbp.attach(model, optimizer, include=chosen)
    decor.detach()
    decor = dbp.attach(nn.ModuleList([first, second]), optimizer)
    assert {"0.head", "1.head"} <= set(decor.decorrelated())


def test_a_layer_whose_optimiser_is_gone_may_be_attached_again():
    """Who has not kept the handle could not detach it."""
    form = trained(1)
    model, R = form.model, form.decor.R("head")
    with pytest.raises(ValueError, match="is attached already"):
        dbp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    del form
    gc.collect()
    assert dbp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)).R("head") is not R
    gc.collect()
    dbp.decorrelate_model(model)
    assert dbp.nn.is_decorrelated(model.head)
