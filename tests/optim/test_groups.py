"""Layers, their names, groups and options: as with any optimiser of torch."""

import pytest
import torch
from decor_layers import expected, patches, samples_of
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn


def test_learning_rate_schedulers():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(update, 1, 0.5)
    for _ in range(2):
        R = layer.R.clone()
        x = torch.randn(10, 3)
        layer(x)
        lr = update.param_groups[0]["lr"]
        update.step()
        schedule.step()
        R_new, _ = expected(patches(layer, x[:1]), R, lr, 0.5)
        torch.testing.assert_close(layer.R, R_new.float())
    assert update.param_groups[0]["lr"] == 0.025
    assert isinstance(update, torch.optim.Optimizer)


def test_lr_zero_freezes_a_layer_and_copies_nothing():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.0)
    layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    update.param_groups[0]["lr"] = 0.1
    layer(torch.randn(4, 3))
    update.param_groups[0]["lr"] = 0.0  # a scheduler between the forward pass and step()
    update.step()
    assert torch.equal(layer.R, torch.eye(3))
    assert samples_of(update) == [[]]


def test_groups_override_settings_per_layer():
    net = nn.Sequential(dnn.DecorConv2d(2, 3, 3), nn.Flatten(), dnn.DecorLinear(27, 4))
    groups = [
        {"modules": [net[0]], "lr": 0.01, "kappa": 1.0, "sample": 3},
        {"modules": [("head", net[2])], "rule": "normalized", "demean": True},
    ]
    update = dbp.DecorUpdate(groups, lr=0.1, sample=0.5)
    assert "lr" in groups[0]
    assert "params" not in groups[0]
    x = torch.randn(8, 2, 5, 5)
    hidden = net[0](x).flatten(1).detach()
    net[2](hidden)
    assert [len(s[0]) for s in samples_of(update)] == [3, 4]
    update.step()
    first, _ = expected(patches(net[0], x[:3]), torch.eye(18), 0.01, 1.0)
    second, _ = expected(patches(net[2], hidden[:4]), torch.eye(27), 0.1, 0.5, "normalized", True)
    torch.testing.assert_close(net[0].R, first.float())
    torch.testing.assert_close(net[2].R, second.float(), rtol=1e-5, atol=1e-5)
    assert list(update.losses()) == ["0", "head"]


def test_groups_can_update_at_different_steps():
    net = nn.ModuleList([dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2)])
    update = dbp.DecorUpdate(
        [{"modules": [net[0]], "update_every": 2}, {"modules": [net[1]]}], lr=0.1
    )
    update.step()
    for layer in net:
        layer(torch.randn(4, 3))
    assert [len(s) for s in samples_of(update)] == [0, 1]


def test_add_param_group():
    first, second = dnn.DecorLinear(3, 2), dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(first, lr=0.1)
    update.add_param_group({"modules": second, "lr": 0.2})
    assert [g["lr"] for g in update.param_groups] == [0.1, 0.2]
    first(torch.randn(4, 3)), second(torch.randn(4, 3))
    update.step()
    assert list(update.losses()) == ["DecorLinear", "group1.DecorLinear"]
    with pytest.raises(ValueError, match="more than one group"):
        update.add_param_group({"modules": first})
    with pytest.raises(ValueError, match="kappa=2"):
        update.add_param_group({"modules": dnn.DecorLinear(2, 2), "kappa": 2})
    assert len(update.param_groups) == len(update._layers) == len(update._recorders) == 2


def test_a_groups_modules_may_come_from_an_iterator():
    first, second = dnn.DecorLinear(3, 2), dnn.DecorLinear(3, 2)
    groups = [{"modules": iter([first])}, {"modules": (m for m in [second])}]
    assert [len(g["params"]) for g in dbp.DecorUpdate(groups).param_groups] == [1, 1]


def test_names():
    net = nn.Sequential(nn.Sequential(dnn.DecorLinear(3, 3)), dnn.DecorLinear(3, 3))

    def names(argument):
        return [n for n, _ in dbp.DecorUpdate(argument)._named_layers()]

    assert names(net) == names(torch.compile(net)) == ["0.0", "1"]
    assert names(iter(net)) == names(list(net)) == ["0.0", "1"]
    assert names(net.modules()) == ["0.0.0", "0.1"]  # every layer once, by its first name
    assert names(net.named_modules()) == ["0.0", "1"]
    assert names([("a", net[1]), ("b", net[0])]) == ["a", "b.0"]
    assert names(net[1]) == ["DecorLinear"]
    other = nn.Sequential(net[1])
    assert names([{"modules": net[0]}, {"modules": other}]) == ["0", "group1.0"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": torch.tensor(-0.1)}, "lr"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr"),
        ({"lr": "0.1"}, "lr"),
        ({"kappa": 1.5}, "kappa"),
        ({"kappa": None}, "kappa"),
        ({"kappa": torch.tensor(0.5)}, "kappa"),
        ({"sample": 0}, "sample"),
        ({"sample": 0.0}, "sample"),
        ({"sample": 1.5}, "sample"),
        ({"sample": True}, "sample"),
        ({"sample": None}, "sample"),
        ({"rule": "other"}, "rule"),
        ({"update_every": 0}, "update_every"),
        ({"update_every": 1.5}, "update_every"),
        ({"demean": 1}, "demean"),
        ({"sampling": "last"}, "sampling"),
    ],
)
def test_bad_options(options, name):
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match=f"^{name}="):
        dbp.DecorUpdate(layer, **options)
    with pytest.raises(ValueError, match=f"^{name}="):
        dbp.DecorUpdate([{"modules": layer, **options}])
    assert layer._recorder is None


def test_bad_first_argument():
    with pytest.raises(ValueError, match="decorrelate_model"):
        dbp.DecorUpdate(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="decorrelate_model"):
        dbp.DecorUpdate([])
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match="more than one group"):
        dbp.DecorUpdate([{"modules": layer}, {"modules": [layer]}])
    with pytest.raises(ValueError, match="learning_rate"):
        dbp.DecorUpdate([{"modules": layer, "learning_rate": 0.1}])
    with pytest.raises(ValueError, match="called 'a'"):
        dbp.DecorUpdate([("a", layer), ("a", dnn.DecorLinear(3, 2))])
    for argument in (3, {"modules": layer}, layer.parameters(), [{"params": layer}], [layer, 3]):
        with pytest.raises(TypeError, match="expected"):
            dbp.DecorUpdate(argument)
    assert layer._recorder is None


def test_repr():
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2))
    text = repr(dbp.DecorUpdate(net, lr=0.5))
    assert "group 0: 2 layers" in text
    assert "lr=0.5" in text
    assert "tensor" not in text
