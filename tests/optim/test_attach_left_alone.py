"""Weights that ``dbp.attach`` cannot take: each has a line that says why."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dbp_kernels as dbp


def left_alone(*layers):
    """The lines for some layers, beside a plain one that is attached."""
    model = nn.Sequential(nn.Linear(3, 3), *layers)
    decor = dbp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(decor.decorrelated()) == ["0"]
    return decor.left_alone()


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_a_weight_that_is_a_dtensor(mesh):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    by_hand = nn.Linear(3, 4)
    by_hand.weight = nn.Parameter(distribute_tensor(by_hand.weight.detach(), mesh, [Shard(0)]))
    assert left_alone(by_hand) == {"1": "its weight is a DTensor, sharded beforehand"}
    whole = distribute_module(nn.Conv2d(3, 4, 3), mesh)
    assert left_alone(whole) == {"1": "its weight is a DTensor, sharded beforehand"}


@pytest.mark.distributed
def test_fully_shard(mesh):
    from torch.distributed.fsdp import fully_shard

    sharded = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    reason = "its weight is a DTensor, sharded beforehand"
    assert left_alone(sharded) == {"1.0": reason, "1.1": reason}
    with pytest.raises(ValueError, match="sharded beforehand"):
        dbp.attach(sharded, torch.optim.SGD(sharded.parameters(), lr=0.1))


def test_a_weight_whose_entries_are_elsewhere():
    """As in FSDP's flat parameters, and DeepSpeed's stage 3."""
    layers = nn.Linear(3, 4), nn.ConvTranspose2d(3, 4, 2), nn.Linear(3, 4)
    layers[0].weight = nn.Parameter(torch.empty(0))
    layers[1].weight = nn.Parameter(torch.empty(0))
    layers[2].weight = nn.Parameter(torch.empty(5))
    assert left_alone(*layers) == {
        "1": "its weight is empty: sharded beforehand?",
        "2": "its weight is empty: sharded beforehand?",
        "3": "its weight of shape (5,) does not have patches of 3",
    }


def test_parametrised_weights():
    pruned, normed = nn.Linear(3, 3), nn.Conv2d(3, 3, 1)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrizations.weight_norm(normed)
    both = nn.Linear(3, 3)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(both, name, nn.Tanh())
    assert left_alone(pruned, normed, both) == {
        "1": "its weight is not a plain parameter",
        "2": "its weight is parametrised",
        "3": "its weight, bias is parametrised",
    }


def test_subclasses_and_shared_weights():
    class Own(nn.Linear):
        pass

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert left_alone(Own(3, 3), first, second) == {
        "1": "Own is no kind that dbp.register knows",
        "2": "its weight is that of '3' too",
        "3": "its weight is that of '2' too",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    ],
    ids=["pruned", "parametrised"],
)
def test_a_layer_that_is_changed_after_attach_learns_no_more(change):
    """Its weight is another one's input now: the optimiser goes on with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2)
    Rs = []
    for step in range(3):
        if step == 1:
            change(model[0])
        model(torch.randn(8, 4).double()).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        Rs.append([decor.R(name).clone() for name in ("0", "1")])
    assert torch.equal(Rs[0][0], Rs[2][0])
    assert not torch.equal(Rs[0][1], Rs[2][1])
