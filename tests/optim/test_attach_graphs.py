"""attach(cuda_graph=True): R and A = W R by one graph, with a stand-in for CUDA's graphs and on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.optim import graphs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def train(model, graphed, steps=10, device="cpu", autocast=False, step=lambda optimizer: None):
    """The handle after some steps of SGD; ``step`` is called before each."""
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5, cuda_graph=graphed)
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=data).to(device)
        y = torch.randint(5, (8,), generator=data).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        step(optimizer)
        optimizer.step()
    return decor


def everything(model, decor):
    found = dict(model.state_dict())
    for name in decor.decorrelated():
        found |= {f"{name} W": decor.W(name), f"{name} R": decor.R(name)}
    return found


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was replayed, on a make-believe CUDA device with the CPU's tensors."""
    count = []

    class Capture:
        def __init__(self, device):
            pass

        def __call__(self, work):
            def replay():
                count.append(1)
                cells = [cell.cell_contents for cell in work.func.__closure__]
                owner = next(content for content in cells if hasattr(content, "_sites"))
                # as with a graph, autograd does not see what is written
                hidden = [t for site in owner._sites for t in (site.weight, site.R)]
                with torch.autograd._unsafe_preserve_version_counter(tuple(hidden)):
                    work()

            return replay

    monkeypatch.setattr(graphs, "Capture", Capture)
    monkeypatch.setattr(graphs, "_device", lambda jobs: torch.device("cpu") if jobs else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return count


def test_steps_equal_those_without_a_graph(replays):
    plain, graphed = network(), network()
    expected = everything(plain, train(plain, False))
    found = everything(graphed, train(graphed, True))
    assert len(replays) == 7
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_replay_is_no_write_from_outside_and_makes_old_passes_stale(replays, recwarn):
    model = network()
    versions = []
    train(model, True, step=lambda o: versions.append(model[0].weight._version))
    assert versions == sorted(set(versions))
    assert not recwarn.list


def test_a_reload_between_replays_is_seen(replays):
    """What is captured reads W's memory, which a write from outside changes in place."""
    results = []
    for graphed in (False, True):
        model = network()
        best = copy.deepcopy(model.state_dict())
        seen = []

        def reload(optimizer, model=model, best=best, seen=seen):
            seen.append(1)
            if len(seen) == 6:
                model.load_state_dict(best)

        with pytest.warns(UserWarning, match="changed outside"):
            decor = train(model, graphed, step=reload)
        results.append(everything(model, decor))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert len(replays) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_on_a_device_equal_those_without_a_graph(autocast):
    plain, graphed = network(), network()
    expected = everything(plain, train(plain, False, device="cuda", autocast=autocast))
    decor = train(graphed, True, device="cuda", autocast=autocast)
    assert decor._engine._graphs._replays
    tolerance = 2e-2 if autocast else 1e-4
    torch.testing.assert_close(
        everything(graphed, decor), expected, rtol=tolerance, atol=tolerance / 10
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"cuda_graph": False}, False), ({"budget": 0.1}, False)],
)
def test_graphs_are_the_default_where_they_can_be(options, expected):
    model = network()
    decor = dbp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    assert (decor._engine._graphs is not None) == expected
