"""What learns R, in other processes: handed to a spawned one, and in one that was forked."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import dbp_kernels as dbp

OPTIONS = {
    "plain": {},
    "random": {"sampling": "random", "update_every": 2},
    "budget": {"budget": 0.3, "costs": "planned"},
}


class Shared(nn.Module):
    """Two layers that are fed the same tensor, and so share R, and one after them."""

    def __init__(self, linear) -> None:
        super().__init__()
        self.left, self.right, self.last = linear(6, 5), linear(6, 5), linear(5, 3)

    def forward(self, x):
        return self.last(torch.relu(self.left(x) * self.right(x)))


def make(form: str, options: dict):
    """(model, optimiser, what learns R), after some steps."""
    torch.manual_seed(0)
    model = Shared(nn.Linear if form == "attach" else dbp.nn.DecorLinear)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    options = {"lr": 1e-2, "sample": 0.5, **options}
    if form == "attach":
        decor = dbp.attach(model, optimizer, **options)
    else:
        decor = dbp.DecorUpdate(model, **options)
    trained = model, optimizer, decor
    train(*trained, seed=1)
    return trained


def train(model, optimizer, decor, seed: int):
    """Some steps; what has been learnt by then."""
    for x in torch.randn(7, 16, 6, generator=torch.Generator().manual_seed(seed)):
        model(x).square().mean().backward()
        optimizer.step()
        if isinstance(decor, dbp.DecorUpdate):
            decor.step()
        optimizer.zero_grad()
    return learnt(model, optimizer, decor)


def learnt(model, optimizer, decor):
    found = {**model.state_dict(), **decor.losses()}
    if not isinstance(decor, dbp.DecorUpdate):
        for name in decor.decorrelated():
            found |= {f"R {name}": decor.R(name), f"W {name}": decor.W(name)}
    return {name: value.tolist() for name, value in found.items()}


def trained_there(queue, *several):
    for trained in several:
        queue.put(train(*trained, seed=2))


def results(method: str, several: list) -> list:
    """What a process of this start method has learnt when it went on with each of them."""
    context = mp.get_context(method)
    queue = context.Queue()
    process = context.Process(target=trained_there, args=(queue, *several))
    process.start()
    there = [queue.get(timeout=60) for _ in several]
    process.join(60)
    assert process.exitcode == 0
    return there


@pytest.mark.parametrize("form", ["attach", "layers"])
def test_a_spawned_process_goes_on_and_shares_what_it_learns(form):
    several = [make(form, options) for options in OPTIONS.values()]
    copies = copy.deepcopy(several)
    there = results("spawn", several)
    assert there == [train(*trained, seed=2) for trained in copies]
    # parameters are the processes' in common, as plain torch's are, and R and W with them
    assert learnt(*several[0]) == there[0]
    assert train(*several[0], seed=3) == train(*copies[0], seed=3)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("form", ["attach", "layers"])
def test_a_forked_process_goes_on_by_itself(form):
    several = [make(form, options) for options in OPTIONS.values()]
    before = [learnt(*trained) for trained in several]
    there = results("fork", several)
    assert [learnt(*trained) for trained in several] == before
    assert there == [train(*trained, seed=2) for trained in several]
