"""decorrelate_model, on models that know nothing of this package."""

import copy
import pickle

import pytest
import torch
from plain_models import (
    MODELS,
    LanguageModel,
    ResNet,
    decorrelated,
    names,
    random_R,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:.*nested tensor.*")


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def case(request):
    torch.manual_seed(0)
    make, data = MODELS[request.param]
    return make(), data


def test_outputs_and_parameters_stay(case):
    model, data = case
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        x = data(4)
        before = plain(*x)
        assert dbp.decorrelate_model(model) is model
        torch.testing.assert_close(model(*x), before)
        with torch.no_grad():
            torch.testing.assert_close(model(*x), plain(*x))
    assert len(decorrelated(model)) > 0
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in parameters)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    model.load_state_dict(plain.state_dict())  # a plain checkpoint


def test_train_then_fuse(case):
    model, data = case
    plain = copy.deepcopy(model)
    dbp.decorrelate_model(model)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(*data(4)).square().mean().backward()
        optimiser.step()
        decor.step()
    # Layers that attention reads behind their backs are not touched, so all of these learn.
    assert len(decor.losses()) == len(decorrelated(model))
    eye_distance = [(m.R - torch.eye(m.R.shape[-1])).abs().max() for m in decorrelated(model)]
    assert min(eye_distance) > 0
    model.eval()
    x = data(4)
    with torch.no_grad():
        expected = model(*x)
        fused = dbp.fuse_model(copy.deepcopy(model))
        assert decorrelated(fused) == []
        assert decorrelated(model) != []
        torch.testing.assert_close(fused(*x), expected, rtol=1e-4, atol=1e-5)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(fused.state_dict())
    if not isinstance(model, LanguageModel):  # the plain one ties two weights that now differ
        torch.testing.assert_close(plain.eval()(*x), expected, rtol=1e-4, atol=1e-5)
    pickle.loads(pickle.dumps(fused))(*x)


def test_round_trip_without_training_changes_nothing(case):
    model, _ = case
    parameters, attributes = list(model.parameters()), [set(m.__dict__) for m in model.modules()]
    dbp.fuse_model(dbp.decorrelate_model(model))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_shared_modules_are_followed_once():
    model = dbp.decorrelate_model(ResNet())
    assert model.again is model.layers[0]
    assert type(model.again.conv1) is dnn.DecorConv2d
    decor = dbp.DecorUpdate(model, sample=1.0)
    model(torch.randn(2, 3, 8, 8))
    recorder = {n: r for (n, _), r in zip(decor._named_layers(), decor._recorders[0])}
    assert len(recorder["layers.0.conv1"].samples) == 2
    assert len(recorder["layers.1.conv1"].samples) == 1


def test_hooks_attributes_and_outside_references_survive():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    model[0].register_forward_pre_hook(lambda m, i: seen.append("pre"))
    model[0].note = "kept"
    model[1].eval().requires_grad_(False)
    first = model[0]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    dbp.decorrelate_model(model)
    assert first is model[0]
    assert type(first) is dnn.DecorLinear
    assert first.note == "kept"
    model(torch.randn(2, 3))
    assert seen == ["pre", dnn.DecorLinear]
    assert not model[1].training
    assert not model[1].weight.requires_grad
    assert optimiser.param_groups[0]["params"][0] is model[0].weight
    random_R(model)
    assert not dbp.fuse_model(model)[1].weight.requires_grad


def test_dtype_and_device():
    model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3).double()))
    assert [m.R.dtype for m in model] == [torch.float32, torch.float64]
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    assert dbp.decorrelate_model(model).R.is_meta
    assert dbp.fuse_model(model).weight.is_meta


def test_a_root_that_is_a_layer():
    layer = nn.Conv2d(2, 3, 3)
    assert type(dbp.decorrelate_model(layer)) is dnn.DecorConv2d
    assert type(dbp.fuse_model(layer)) is nn.Conv2d


def test_idempotent():
    model = dbp.decorrelate_model(ResNet())
    random_R(model)
    state = copy.deepcopy(model.state_dict())
    dbp.decorrelate_model(model)
    for a, b in zip(state.values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class MyLinear(nn.Linear):
    pass


def test_only_exact_types_with_plain_weights():
    pruned = nn.Linear(3, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    layers = {
        "subclass": MyLinear(3, 3),
        "parametrized": parametrizations.weight_norm(nn.Linear(3, 3)),
        "old weight norm": weight_norm(nn.Linear(3, 3)),
        "pruned": pruned,
        "lazy": nn.LazyLinear(3),
        "attention": nn.MultiheadAttention(4, 2),
        "bilinear": nn.Bilinear(3, 3, 3),
        "embedding": nn.Embedding(3, 3),
        "transposed 1d": nn.ConvTranspose1d(3, 3, 3),
        "complex": nn.Linear(3, 3, dtype=torch.complex64),
    }
    model = nn.ModuleDict(layers)
    before = [type(m) for m in model.modules()]
    dbp.decorrelate_model(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match="no decorrelated layer"):
        dbp.DecorUpdate(model)


def test_compiled_before_surgery():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3)
    torch.testing.assert_close(compiled(x), model(x))
    dbp.decorrelate_model(model)
    random_R(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert names(dbp.decorrelate_model(compiled, include="0")._orig_mod) == ["0"]
    decor = dbp.DecorUpdate(compiled)
    compiled(x)
    assert len(decor._recorders[0][0].samples) == 1
    dbp.fuse_model(model)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_list_of_buffers_ddp_leaves_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model._ddp_params_and_buffers_to_ignore = ["1.running_mean"]
    dbp.decorrelate_model(model)
    assert set(model._ddp_params_and_buffers_to_ignore) == {"0.R", "1.running_mean"}
    dbp.fuse_model(model)
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_mean"]
    assert not hasattr(dbp.fuse_model(ResNet()), "_ddp_params_and_buffers_to_ignore")
    built_by_hand = nn.Sequential(dnn.DecorLinear(3, 3))
    dbp.DecorUpdate(nn.Sequential(built_by_hand))
    dbp.DecorUpdate(built_by_hand)
    assert built_by_hand._ddp_params_and_buffers_to_ignore == ["0.R"]


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    """Adapters and offloading hooks replace it on the instance, and would go on without R."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain_forward = model[0].forward
    model[0].forward = lambda x: plain_forward(x) * 2
    dbp.decorrelate_model(model)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is dnn.DecorLinear
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) * 2
    with pytest.raises(ValueError, match=r"'1'.*forward"):
        dbp.fuse_model(model)
    assert type(model[1]) is dnn.DecorLinear
    del model[1].forward
    dbp.fuse_model(model)
    assert type(model[1]) is nn.Linear


def test_an_attached_layer_is_not_decorrelated_once_more(capsys):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    decor = dbp.attach(model, torch.optim.SGD(model.parameters(), 0.1), exclude="1")
    dbp.decorrelate_model(model, report=True)
    assert names(model) == ["1"]
    assert "0  dbp.attach has its R" in capsys.readouterr().out
    decor.detach()
    dbp.decorrelate_model(model)
    assert names(model) == ["0", "1"]
