"""attach(follow_lr=True): R falls to rest with the weights."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import dbp_kernels as dbp

EPS = 1e-2


def pair(kind=torch.optim.SGD, lr=0.1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = kind(model.parameters(), lr=lr)
    decor = dbp.attach(model, optimizer, lr=EPS, sample=1.0, clip=None, **options)
    return model, optimizer, decor


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator, dtype=torch.float64) for _ in range(steps)]


def step(model, optimizer, x):
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def rate_of_step(model, optimizer, decor, x):
    """R's lr in this step, told from what becomes of the first layer's R."""
    before = decor.R("0").clone()
    step(model, optimizer, x)
    expected, _ = torch.ops.dbp.decor_update(x, before, [], [], [], [], 1, 1.0, 0.5)
    full = before - expected
    return ((before - decor.R("0")) / full)[full.abs() > 1e-9].mean().item()


def test_R_learns_at_the_share_of_the_highest_lr():
    model, optimizer, decor = pair()
    rates = []
    for lr, x in zip((0.05, 0.1, 0.2, 0.1, 0.02, 0.0, 0.2), batches(7), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        rates.append(rate_of_step(model, optimizer, decor, x))
    shares = (1, 1, 1, 0.5, 0.1, 0, 1)
    assert rates == pytest.approx([EPS * share for share in shares], rel=1e-6, abs=1e-12)


def test_constant_lr_is_the_papers_rule_bit_for_bit():
    results = []
    for follow in (True, False):
        model, optimizer, decor = pair(follow_lr=follow)
        for x in batches(5):
            step(model, optimizer, x)
        results.append([decor.R("0"), decor.R("2"), *model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_not_followed_when_told_so():
    model, optimizer, decor = pair(follow_lr=False)
    optimizer.param_groups[0]["lr"] = 0.1
    first, second = batches(2)
    step(model, optimizer, first)
    optimizer.param_groups[0]["lr"] = 0.01
    assert rate_of_step(model, optimizer, decor, second) == pytest.approx(EPS, rel=1e-6)


def test_each_group_has_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 1.0}]
    )
    decor = dbp.attach(model, optimizer, lr=EPS, sample=1.0)
    first, second = batches(2)
    step(model, optimizer, first)
    optimizer.param_groups[1]["lr"] = 0.0
    R = decor.R("1").clone()
    assert rate_of_step(model, optimizer, decor, second) == pytest.approx(EPS, rel=1e-6)
    assert torch.equal(decor.R("1"), R)


def test_goes_on_bit_for_bit_from_a_state():
    model, optimizer, decor = pair()
    data = batches(4)
    step(model, optimizer, data[0])
    optimizer.param_groups[0]["lr"] = 0.03
    step(model, optimizer, data[1])
    twin, its, again = pair()
    twin.load_state_dict(model.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in data[2:]:
        step(model, optimizer, x)
        step(twin, its, x)
    assert torch.equal(decor.R("0"), again.R("0"))
    model2, optimizer2, decor2 = copy.deepcopy((model, optimizer, decor))
    step(model, optimizer, data[0])
    step(model2, optimizer2, data[0])
    assert torch.equal(decor.R("0"), decor2.R("0"))


@pytest.mark.parametrize("rates", [[], {"0": -1.0}, {"0": "high"}, {"0": math.inf}, {"0": True}])
def test_loaded_rates_are_checked(rates):
    _, optimizer, _ = pair()
    state = optimizer.state_dict()
    progress = json.loads(state["param_groups"][0]["dbp"]["progress"])
    progress["highest_lr"] = rates
    state["param_groups"][0]["dbp"]["progress"] = json.dumps(progress)
    with pytest.raises(ValueError, match="highest_lr"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)])
def test_lr_as_a_tensor(lr):
    model, optimizer, decor = pair(torch.optim.Adam, lr=lr)
    first, second = batches(2)
    step(model, optimizer, first)
    optimizer.param_groups[0]["lr"].fill_(0.05)
    assert rate_of_step(model, optimizer, decor, second) == pytest.approx(EPS / 2, rel=1e-6)


def test_lr_on_a_device_is_not_read():
    model, optimizer, decor = pair()
    first, second = batches(2)
    step(model, optimizer, first)
    site = decor._site("0")
    site.saw_lr(torch.tensor(0.05, device="meta"))  # which has no value to read
    assert (site.highest_lr, site.lr_share) == (0.1, 1.0)
    assert rate_of_step(model, optimizer, decor, second) == pytest.approx(EPS, rel=1e-6)


def test_optimisers_without_lr_leave_R_its_own():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=0.1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    optimizer = Own(model.parameters())
    decor = dbp.attach(model, optimizer, lr=EPS, sample=1.0)
    for x in batches(2):
        assert rate_of_step(model, optimizer, decor, x) == pytest.approx(EPS, rel=1e-6)


def test_refuses_what_is_no_bool():
    with pytest.raises(ValueError, match="follow_lr=1"):
        pair(follow_lr=1)
