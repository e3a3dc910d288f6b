"""fuse_model: plain layers again, each with its own A = W R."""

import pytest
import torch
from plain_models import LanguageModel, random_R
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*")


def test_tied_weights_keep_their_values_and_lose_the_tie():
    model = dbp.decorrelate_model(LanguageModel())
    embedding, head = model.embed.weight, model.head.weight
    assert embedding is head
    random_R(model)
    before = embedding.detach().clone()
    expected = before @ model.head.R
    dbp.fuse_model(model)
    assert torch.equal(model.embed.weight, before)
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model.head.weight, expected)


def test_layers_that_share_a_parameter_fuse_each_with_its_own_R():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    dbp.decorrelate_model(model)
    assert model[1].weight is model[0].weight
    random_R(model)
    x = torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(dbp.fuse_model(model)(x), expected)


def test_fuse_keeps_marks_on_parameters():
    model = dbp.decorrelate_model(nn.Linear(3, 3))
    model.weight.no_decay = True
    random_R(model)
    assert dbp.fuse_model(model).weight.no_decay


def test_fuse_refuses_what_it_cannot_do_and_changes_nothing():
    class Special(dnn.DecorLinear):
        pass

    for spoil in (
        lambda m: Special(3, 3),
        lambda m: parametrizations.weight_norm(m),
        weight_norm,
        lambda m: prune.l1_unstructured(m, "weight", 2) and m,
    ):
        model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        model[1] = spoil(model[1])
        random_R(model)
        weight = model[0].weight
        with pytest.raises(ValueError, match="cannot fuse layer '1'"):
            dbp.fuse_model(model)
        assert type(model[0]) is dnn.DecorLinear
        assert model[0].weight is weight
        model(torch.randn(2, 3)).sum().backward()  # reparametrised layers work as they are


def test_fuse_ends_the_optimiser():
    model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3)))
    decor = dbp.DecorUpdate(model)
    model(torch.randn(2, 3))
    dbp.fuse_model(model)
    assert not decor._recorders[0][0].samples
    with pytest.raises(RuntimeError, match="fused"):
        decor.step()


def test_decorrelate_module_stays():
    model = nn.Sequential(dnn.Decorrelate(4), nn.Linear(4, 2))
    dbp.decorrelate_model(model)
    random_R(model)
    x = torch.randn(3, 4)
    expected = model(x)
    dbp.fuse_model(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model[0]) is dnn.Decorrelate
    assert type(model[1]) is nn.Linear
