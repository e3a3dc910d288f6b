"""A small network under ``dbp.attach``, and all that its training changes: for tests of attach."""

import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp

# lr of R above the default: what is compared must have moved
OPTIONS = {"lr": 1e-2, "sample": 0.5, "update_every": 2, "sampling": "random"}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def batches(first, last):
    """Those of the steps from first to last, without it."""
    generator = torch.Generator().manual_seed(1)
    everything = [
        (1 + torch.randn(4, 3, 4, 4, generator=generator), torch.tensor([0, 1, 2, 4]))
        for _ in range(last)
    ]
    return everything[first:]


def attached(optimizer="adamw", **options):
    """(model, optimizer, handle), not trained yet."""
    model = make_model()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(2)  # from which the order of random samples comes
    return model, optimizer, dbp.attach(model, optimizer, **{**OPTIONS, **options})


def train(model, optimizer, first, last):
    for x, y in batches(first, last):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(steps, optimizer="adamw", **options):
    model, optimizer, decor = attached(optimizer, **options)
    train(model, optimizer, 0, steps)
    return model, optimizer, decor


def everything(model, decor):
    """All that training changes, by name: copies."""
    changed = {f"A {name}": value for name, value in model.state_dict().items()}
    for name in decor.decorrelated():
        changed |= {f"W {name}": decor.W(name), f"R {name}": decor.R(name)}
    return {name: value.detach().clone() for name, value in changed.items()}


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def assert_learnt(state):
    for name, value in state.items():
        if name.startswith("R"):
            assert not torch.equal(value, torch.eye(len(value))), name
