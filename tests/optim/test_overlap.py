"""DecorUpdate.overlap(): the result of step(), worked out before the block and written after it."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import distributed
from dbp_kernels import nn as dnn
from dbp_kernels.optim import decor_update as update_module
from dbp_kernels.optim import streams


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(dnn.DecorConv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), dnn.DecorLinear(144, 5))
    return net


def train(net: nn.Module, overlap: bool, steps: int = 3, **options) -> dbp.DecorUpdate:
    decor = dbp.DecorUpdate(net, lr=1e-2, sample=0.5, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(torch.randn(8, 3, 8, 8, generator=data)).square().mean()
        if overlap:
            with decor.overlap():
                loss.backward()
                optimizer.step()
        else:
            loss.backward()
            optimizer.step()
            decor.step()
    return decor


@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"demean": True}], ids=str)
def test_the_result_is_that_of_step(options):
    plain, beside = network(), network()
    expected = train(plain, overlap=False, **options)
    decor = train(beside, overlap=True, **options)
    torch.testing.assert_close(dict(beside.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert decor.losses() == expected.losses()
    assert decor.state_dict()["steps"] == 3
    assert not torch.equal(beside[0].R, torch.eye(27))


def test_R_changes_at_the_end_of_the_block_only():
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(8, 3, 8, 8))
    with decor.overlap():
        assert torch.equal(net[0].R, torch.eye(27))
        assert torch.is_grad_enabled()
    assert not torch.equal(net[0].R, torch.eye(27))


def test_an_error_in_the_block_changes_nothing():
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(8, 3, 8, 8))
    with pytest.raises(KeyError), decor.overlap():
        raise KeyError
    assert torch.equal(net[0].R, torch.eye(27))
    assert not any(recorder.samples for group in decor._recorders for recorder in group)
    assert decor.state_dict()["steps"] == 0


def doubled(layer: nn.Module) -> None:
    layer.R.mul_(2)


def replaced(layer: nn.Module) -> None:
    layer.R = 2 * layer.R


@pytest.mark.parametrize("change", [doubled, replaced])
def test_R_changed_in_the_block_is_an_error(change):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(8, 3, 8, 8))
    with pytest.raises(RuntimeError, match="R was changed"), decor.overlap():
        change(net[3])
    assert torch.equal(net[3].R, 2 * torch.eye(144))
    assert torch.equal(net[0].R, torch.eye(27))


def test_bad_settings_are_found_before_the_block():
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(8, 3, 8, 8))
    decor.param_groups[0]["kappa"] = 3.0
    with pytest.raises(ValueError, match="kappa"), decor.overlap():
        pytest.fail("the block was entered")
    with pytest.raises(RuntimeError, match="budget"), dbp.DecorUpdate(net, budget=0.1).overlap():
        pytest.fail("the block was entered")


def test_options_are_those_at_the_beginning_of_the_block():
    nets = [network() for _ in range(2)]
    images = torch.randn(8, 3, 8, 8)
    for net, changed in zip(nets, (False, True)):
        decor = dbp.DecorUpdate(net, lr=0.01)
        net(images)
        with decor.overlap():
            if changed:
                decor.param_groups[0].update(lr=0.5, clip=None)
    assert torch.equal(nets[0][0].R, nets[1][0].R)
    assert torch.equal(nets[0][3].R, nets[1][3].R)


def test_the_first_time_with_several_ranks_is_a_step_after_the_block(monkeypatch):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    order = []
    monkeypatch.setattr(distributed, "active", lambda group: True)
    monkeypatch.setattr(decor, "step", lambda: order.append("step"))
    net(torch.randn(8, 3, 8, 8))
    with suppress(KeyError), decor.overlap():
        order.append("failing block")
        raise KeyError
    assert not any(recorder.samples for group in decor._recorders for recorder in group)
    with decor.overlap():
        order.append("block")
    assert order == ["failing block", "block", "step"]


class FakeStream:
    """Writes down what is asked of a torch.cuda.Stream."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What happens to streams, on a make-believe CUDA device that holds the CPU's tensors."""
    log: list[str] = []
    made = iter(range(9))

    @contextmanager
    def entered(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextmanager
    def device(index):
        log.append(f"device {index}")
        yield

    main = FakeStream(log, "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, f"side{next(made)}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "device", device)
    return log


def test_a_fork_waits_for_what_was_before_and_a_join_for_the_fork(log):
    side = streams.SideStreams()
    for _ in range(2):  # the stream is made once
        with side.fork([torch.device("cuda", 1), torch.device("cpu")]):
            log.append("work")
        side.join()
    once = ["side0 waits for main", "on side0", "device 0", "work", "off side0"]
    assert log == 2 * [*once, "main waits for side0"]


def test_a_closed_fork_lets_nothing_in_before_the_work_so_far(log):
    side = streams.SideStreams()
    with side.fork([torch.device("cuda", 0)]):
        pass
    log.clear()
    side.close()
    assert log == ["main waits for side0", "side0 waits for main"]


@pytest.mark.parametrize("failing", [False, True])
def test_streams_join_before_R_is_written_and_samples_are_freed(log, monkeypatch, failing):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    fork = decor._side.fork
    monkeypatch.setattr(decor._side, "fork", lambda devices: fork([torch.device("cuda", 0)]))
    for name in ("_carry_out", "discard"):
        real = getattr(decor, name)
        monkeypatch.setattr(decor, name, lambda *a, n=name, f=real: (log.append(n), f(*a)))
    net(torch.randn(8, 3, 8, 8))
    log.clear()
    with suppress(KeyError), decor.overlap():
        log.append("block")
        if failing:
            raise KeyError
    waits = ["main waits for side0"]
    written = [] if failing else [*waits, "_carry_out"]
    after = [*written, *waits, "side0 waits for main", "discard"]
    assert log[log.index("off side0") :] == ["off side0", "block", *after]


@pytest.mark.parametrize("method", ["discard", "detach"])
def test_samples_dropped_in_the_block_live_until_its_end(method):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(8, 3, 8, 8))
    sample = weakref.ref(decor._recorders[0][0].samples[0])
    with decor.overlap():
        getattr(decor, method)()
        gc.collect()
        assert sample() is not None
    assert sample() is None


@pytest.mark.parametrize("what", ["step", "load_state_dict"])
def test_a_step_or_load_in_the_block_is_an_error(what):
    net = network()
    decor = train(net, overlap=True)
    saved = dbp.DecorUpdate(network()).state_dict()
    before = net[0].R.clone()
    with pytest.raises(RuntimeError, match=r"step\(\) or load_state_dict"), decor.overlap():
        decor.step() if what == "step" else decor.load_state_dict(saved)
    assert torch.equal(net[0].R, before)
    assert decor.state_dict()["steps"] == (4 if what == "step" else 0)


def test_updates_have_no_graph(monkeypatch):
    seen = []
    for name in ("local_updates", "WriteBack"):
        real = getattr(update_module, name)
        watched = lambda *a, f=real: (seen.append(torch.is_grad_enabled()), f(*a))[1]  # noqa: E731
        monkeypatch.setattr(update_module, name, watched)
    train(network(), overlap=True, steps=1)
    assert seen == [False, False]


def test_learning_rate_schedulers_know_of_it(recwarn):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(decor, 1)
    net(torch.randn(8, 3, 8, 8))
    with decor.overlap():
        pass
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_copies_and_pickles_make_streams_of_their_own():
    net = network()
    decor = train(net, overlap=True, matmul_precision="high")
    for other in (copy.deepcopy((net, decor)), pickle.loads(pickle.dumps((net, decor)))):
        assert other[1]._side is not decor._side
        assert "matmul_precision='high'" in repr(other[1])
        other[0](torch.randn(8, 3, 8, 8))
        with other[1].overlap():
            pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_result_on_a_gpu():
    plain, beside = network().cuda(), network().cuda()
    data = [torch.randn(8, 3, 8, 8, device="cuda") for _ in range(20)]
    updates = [dbp.DecorUpdate(net, lr=1e-2, sample=0.5) for net in (plain, beside)]
    for x in data:
        plain(x).square().mean().backward()
        updates[0].step()
        loss = beside(x).square().mean()
        with updates[1].overlap():
            loss.backward()
    torch.testing.assert_close(beside[0].R, plain[0].R)
    torch.testing.assert_close(beside[3].R, plain[3].R)
