"""DecorUpdate(cuda_graph=True): which steps are captured and replayed, with a stand-in for CUDA's graphs.

The stand-in replays by calling the captured Python again, on the objects it was captured with.
"""

import copy
import pickle
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import distributed
from dbp_kernels import nn as dnn
from dbp_kernels.optim import decor_update as update_module
from dbp_kernels.optim import graphs
from dbp_kernels.optim.guard import Guard
from dbp_kernels.optim.step import Job, local_updates
from dbp_kernels.optim.write_back import write_back


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What is captured and replayed, on a make-believe CUDA device that holds the CPU's tensors."""
    log: list[str] = []

    class Capture:
        def __init__(self, device):
            pass

        def __call__(self, work):
            name = f"graph {sum('capture' in line for line in log)}"
            log.append(f"capture {name}")

            def replay():
                log.append(f"replay {name}")
                with unseen(work):
                    work()

            return replay

    monkeypatch.setattr(graphs, "Capture", Capture)
    monkeypatch.setattr(graphs, "_device", lambda jobs: torch.device("cpu") if jobs else None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return log


@contextmanager
def unseen(work):
    """As with a graph, autograd does not see what happens to any R."""
    cells = work.func.__closure__
    jobs = next(c.cell_contents for c in cells if isinstance(c.cell_contents, list))
    with torch.autograd._unsafe_preserve_version_counter(tuple(job.R for job in jobs)):
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [dnn.DecorConv2d(3, 4, 3), nn.ReLU(), dnn.DecorConv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), dnn.DecorLinear(64, 5))


def groups(net: nn.Module) -> list[dict]:
    return [{"modules": net[0]}, {"modules": [net[2], net[5]], "update_every": 2}]


def batches(steps: int, count=8, seed=1) -> list[torch.Tensor]:
    data = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, 8, 8, generator=data) for _ in range(steps)]


def compare(
    data, prepare=lambda decor, step: None, model=lambda net: net, exact=True, **options
) -> None:
    """Trains two networks on the same data, with and without graphs: they stay equal.

    That is bit for bit, or but for rounding to float64.
    """
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-12}
    nets = [network() if exact else network().double() for _ in range(2)]
    data = [[x.to(nets[0][0].R) for x in ([b] if torch.is_tensor(b) else b)] for b in data]
    updates = [
        dbp.DecorUpdate(model(net), lr=1e-2, cuda_graph=graphed, **{"sample": 0.5, **options})
        for net, graphed in zip(nets, (False, True))
    ]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for step, several in enumerate(data):
        for net, decor, optimizer in zip(nets, updates, optimizers):
            prepare(decor, step)
            for x in several:
                net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            decor.step()
        plain, graphed = nets
        torch.testing.assert_close(
            dict(graphed.state_dict()), dict(plain.state_dict()), **tolerance
        )
        for report in ("losses", "skipped"):
            expected = getattr(updates[0], report)()
            torch.testing.assert_close(getattr(updates[1], report)(), expected, **tolerance)
        assert updates[0].state_dict()["steps"] == updates[1].state_dict()["steps"]
    assert not torch.equal(nets[0][0].R, torch.eye(27).to(nets[0][0].R))


def captures(log: list[str]) -> int:
    return sum(line.startswith("capture") for line in log)


def test_twenty_steps_equal_those_without_a_graph(log):
    compare(batches(20))
    # the first step makes the losses' memory, and WARM_UP others count
    assert log == ["capture graph 0"] + 17 * ["replay graph 0"]


@pytest.mark.parametrize(
    "options",
    [
        {"demean": True, "rule": "normalized", "kappa": 0.3},
        {"sampling": "random", "sample": 3},
        {"matmul_precision": "highest"},
    ],
    ids=str,
)
def test_options_are_those_of_the_step(log, options):
    compare(batches(8), **options)
    assert log == ["capture graph 0"] + 5 * ["replay graph 0"]


def test_a_skipped_batch_is_skipped_by_a_replay(log):
    net = network()
    decor = dbp.DecorUpdate(net, lr=1e-2, sample=0.5, cuda_graph=True)
    data = batches(8)
    data[6][0, 0, 0, 0] = float("nan")
    for x in data:
        before = net[0].R.clone()
        net(x)
        decor.step()
        assert torch.equal(net[0].R, before) == bool(x.isnan().any())
    assert log[-2:] == ["replay graph 0"] * 2
    assert set(map(int, decor.skipped().values())) == {1}


def test_accumulation_over_three_passes(log):
    data = batches(24)
    compare([data[i : i + 3] for i in range(0, 24, 3)])
    assert captures(log) == 1


def test_a_smaller_last_batch_is_a_graph_of_its_own(log):
    epoch = [*batches(4), *batches(1, count=6, seed=2)]
    compare(5 * epoch)
    # the large batches' graph survives the small one, whose samples lie in the same memory
    assert captures(log) == 2
    assert log[-5:] == 4 * ["replay graph 0"] + ["replay graph 1"]


def test_every_set_of_due_layers_is_a_graph(log):
    compare(batches(16), model=groups)
    assert captures(log) == 2
    assert log[-2:] == ["replay graph 1", "replay graph 0"]


def test_evaluation_discard_and_steps_without_samples_between(log):
    def prepare(decor, step):
        net = torch.nn.ModuleList(layer for _, layer, _ in decor._places())
        if step % 3 == 0:
            net.eval()
            net[0](batches(1)[0])
            net.train()
        if step % 4 == 0:
            net[0](batches(1)[0])
            decor.discard()
        if step % 5 == 0:
            decor.step()

    compare(batches(12), prepare)
    assert captures(log) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda decor: decor.param_groups[0].update(kappa=0.25),
        lambda decor: decor.param_groups[0].update(rule="normalized"),
        lambda decor: decor.param_groups[0].update(demean=True),
        lambda decor: decor.load_state_dict(decor.state_dict()),
        lambda decor: setattr(decor._layers[0][0], "R", decor._layers[0][0].R.clone()),
        lambda decor: decor._layers[0][0].__dict__.update(padding_mode="circular"),
    ],
    ids=["kappa", "rule", "demean", "load", "R", "geometry"],
)
def test_what_shapes_the_work_is_captured_anew_after_a_change(log, change):
    compare(batches(10), lambda decor, step: change(decor) if step == 5 else None)
    replayed = [line for line in log if "replay" in line]
    assert captures(log) == 2
    # two steps before the change, two without a graph, and three with another
    assert replayed == 2 * ["replay graph 0"] + 3 * ["replay graph 1"]


def test_another_backend_is_captured_anew(log, monkeypatch):
    def prepare(decor, step):
        name = "eager" if step < 5 else "another"
        monkeypatch.setattr(graphs, "backends", SimpleNamespace(selected=lambda device: name))

    compare(batches(10), prepare)
    assert captures(log) == 2
    assert log[-1] == "replay graph 1"


def test_another_clip_is_captured_anew(log):
    """The factors of a graph are numbers that it holds fast."""

    def prepare(decor, step):
        decor.param_groups[0]["clip"] = (0.5, 0.1, None)[step // 5]

    compare(batches(15), prepare)
    assert captures(log) == 3
    assert log[-1] == "replay graph 2"


def test_learning_rates_that_change_at_every_step_need_one_graph(log):
    def schedule(decor, step):
        for factor, group in enumerate(decor.param_groups, 1):
            group["lr"] = factor * 1e-2 / (step + 1)

    compare(batches(12), schedule, lambda net: [{"modules": net[0]}, {"modules": net[2:]}], False)
    assert log == ["capture graph 0"] + 9 * ["replay graph 0"]


def test_a_learning_rate_that_changes_now_and_then_needs_two(log):
    def schedule(decor, step):
        decor.param_groups[0]["lr"] = (1e-2, 2e-2, 5e-3)[step // 6]

    compare(batches(18), schedule, exact=False)
    first, other = "replay graph 0", "replay graph 1"
    assert log == ["capture graph 0", *3 * [first], "capture graph 1", *11 * [other]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_at_a_rate_on_the_device_is_that_at_the_same_number(dtype):
    """For every form that an update has: of layers together, a product, few samples."""
    torch.manual_seed(0)
    jobs, rates = [], [0.01, 0.01, 0.02, 0.04]
    for size, n in ((6, 50), (6, 50), (40, 400), (300, 9)):  # the first two together
        layer = dnn.DecorLinear(size, 2).to(dtype)
        layer.R.add_(torch.randn_like(layer.R), alpha=0.1)
        options = {"kappa": 0.3, "rule": "standard", "demean": False, "clip": 0.4}
        options["lr"] = rates[len(jobs)]
        jobs.append(Job(layer, [torch.randn(n, size, dtype=dtype)], options))
    before = [job.R.clone() for job in jobs]

    def changes(on_device: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for job, rate, R in zip(jobs, rates, before):
            job.rate = torch.tensor(rate) if on_device else None
            job.options["lr"] = 7.0 if on_device else rate
            job.layer.R.copy_(R)
        guard, states = Guard(), [state_of(job.R) for job in jobs]
        batches = local_updates(jobs)
        forms = [(len(batch.jobs), batch.update.few is None) for batch in batches]
        assert sorted(forms) == [(1, False), (1, True), (2, True)]
        write_back(batches, lambda R: next(s for j, s in zip(jobs, states) if j.R is R), guard)
        return [job.R - R for job, R in zip(jobs, before)], states

    (found, states), (expected, expected_states) = changes(True), changes(False)
    for change, expected_change in zip(found, expected):
        torch.testing.assert_close(change, expected_change, atol=1e-6, rtol=1e-4)
        assert expected_change.abs().max() > 1e-3
    assert [int(state["clipped"]) for state in states] == [0, 0, 0, 1]
    torch.testing.assert_close(states, expected_states)


def state_of(R: torch.Tensor) -> dict[str, torch.Tensor]:
    counts = {kind: torch.zeros((), dtype=torch.int64) for kind in ("skipped", "clipped")}
    return {"loss": R.new_zeros(()), **counts}


def test_only_so_many_graphs_are_kept_and_captures_are_rare_then(log, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    monkeypatch.setattr(graphs, "PAUSE", 10)
    kappas = (0.1, 0.2, 0.3)
    prepare = lambda decor, step: decor.param_groups[0].update(kappa=kappas[step % 3])  # noqa: E731
    compare(batches(40), prepare)
    assert captures(log) == 5  # at steps 7 and 8, and ten steps apart from then on


def test_the_graph_dropped_is_the_one_not_used_for_longest(log, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    monkeypatch.setattr(graphs, "PAUSE", 0)
    monkeypatch.setattr(graphs, "WARM_UP", 0)
    monkeypatch.setattr(graphs, "step_key", lambda jobs, states, device: jobs[0])
    monkeypatch.setattr(graphs, "Capture", lambda device: lambda work: lambda: None)
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensors: None)

    class Name(str):
        R, options = None, {"lr": 0.1}

    steps = graphs.StepGraphs()
    for name in "abacb":
        assert steps.run([Name(name)], [{"loss": 0}], lambda rates: None)
    assert [key for ((key, _), _) in steps._replays] == ["c", "b"]


def test_a_failed_capture_is_told_once_and_done_without(log, monkeypatch):
    def failing(self, work):
        log.append("capture")
        try:
            work_that_fails()
        finally:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    def work_that_fails():
        raise ValueError("a host read within a capture")

    monkeypatch.setattr(graphs.Capture, "__call__", failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compare(batches(8))
    assert log == ["capture"]
    assert len(told) == 1
    assert "ValueError: a host read within a capture" in str(told[0].message)


def test_backward_through_a_forward_pass_before_the_replay_raises(log):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1, cuda_graph=True)
    for x in batches(6):
        loss = net(x).square().mean()
        before = [layer.R._version for layer in decor._layers[0]]
        decor.step()
        assert all(layer.R._version > v for layer, v in zip(decor._layers[0], before))
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()
    assert log[-1] == "replay graph 0"


def test_a_detached_optimiser_has_no_graphs(log):
    net = network()
    decor = dbp.DecorUpdate(net, cuda_graph=True)
    for x in batches(5):
        net(x)
        decor.step()
    assert decor._graphs._replays
    decor.detach()
    assert not decor._graphs._replays


def test_copies_capture_graphs_of_their_own(log):
    net = network()
    decor = dbp.DecorUpdate(net, lr=0.1, cuda_graph=True)
    for x in batches(5):
        net(x)
        decor.step()
    for copied, twin in (copy.deepcopy((net, decor)), pickle.loads(pickle.dumps((net, decor)))):
        before, known = net[0].R.clone(), captures(log)
        for x in batches(5):
            copied(x)
            twin.step()
        assert captures(log) == known + 1
        assert torch.equal(net[0].R, before)
        assert "cuda_graph=True" in repr(twin)


def test_a_capture_of_the_callers_own_is_not_nested(log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    compare(batches(6))
    assert log == []


def test_several_ranks_step_without_graphs(log, monkeypatch):
    net = network()
    decor = dbp.DecorUpdate(net, cuda_graph=True)
    monkeypatch.setattr(distributed, "active", lambda group: True)
    monkeypatch.setattr(decor, "_ranks_agree", True)
    monkeypatch.setattr(distributed, "all_reduce", lambda moments, shapes, group: list(moments))
    for x in batches(6):
        net(x)
        decor.step()
    assert log == []


def test_on_a_cpu_steps_run_without_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "Capture", lambda device: pytest.fail("captured on a CPU"))
    compare(batches(6))


def test_overlap_runs_without_graphs(log):
    net = network()
    decor = dbp.DecorUpdate(net, cuda_graph=True)
    for x in batches(6):
        net(x)
        with decor.overlap():
            pass
    assert log == []


def test_a_budget_or_another_value_is_an_error():
    net = network()
    with pytest.raises(ValueError, match=r"cuda_graph=True with budget=0\.1"):
        dbp.DecorUpdate(net, budget=0.1, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph='yes'"):
        dbp.DecorUpdate(net, cuda_graph="yes")
    assert net[0]._recorder is None


# The capture itself, with what it asks of torch.cuda written down.


@pytest.fixture
def cuda(monkeypatch) -> SimpleNamespace:
    """torch.cuda as far as a capture uses it; like torch's, one that fails never leaves its stream."""
    cuda = SimpleNamespace(now="main", graphs=[], ended=[])

    @contextmanager
    def stream(stream):
        before, cuda.now = cuda.now, stream
        try:
            yield
        finally:
            cuda.now = before

    @contextmanager
    def graph(graph, **options):
        cuda.graphs.append(options)
        cuda.now = options["stream"]
        yield
        cuda.now = "main"

    fakes = {
        "Stream": lambda device: f"side of {device}",
        "graph_pool_handle": lambda: (0, 7),
        "current_stream": lambda device: cuda.now,
        "stream": stream,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: cuda.graphs.append("replay")),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    end = lambda device, pool: cuda.ended.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return cuda


def test_captures_of_one_device_share_stream_and_memory(cuda):
    capture = graphs.Capture(torch.device("cuda", 1))
    seen = []
    replays = [capture(lambda: seen.append(cuda.now)) for _ in range(2)]
    assert seen == 2 * ["side of cuda:1"]
    once = {"pool": (0, 7), "stream": "side of cuda:1", "capture_error_mode": "thread_local"}
    assert cuda.graphs == 2 * [once]
    replays[0]()
    assert cuda.graphs[2:] == ["replay"]
    assert (cuda.now, cuda.ended) == ("main", [])


def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(cuda):
    capture = graphs.Capture(torch.device("cuda", 1))
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 // 0)
    assert (cuda.now, cuda.ended) == ("main", [(1, (0, 7))])


# On a device.

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(graphed: bool, **options) -> tuple[nn.Module, dbp.DecorUpdate]:
    net = network().cuda().to(memory_format=torch.channels_last)
    return net, dbp.DecorUpdate(net, lr=1e-2, sample=0.5, cuda_graph=graphed, **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("scheduled", [False, True])
def test_ten_steps_on_a_device_equal_those_without_a_graph(scheduled, monkeypatch):
    """Backward passes, an optimiser and new batches between the replays, under autocast."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for graphed in (False, True):
        net, decor = on_device(graphed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(decor, 0.9 if scheduled else 1.0)
        for x in batches(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = net(x.cuda()).float().square().mean()
            loss.backward()
            optimizer.step()
            decor.step()
            scheduler.step()
        results.append({**net.state_dict(), **{f"loss {k}": v for k, v in decor.losses().items()}})
        assert bool(graphed and decor._graphs._replays) == graphed
    plain, graphed = results
    torch.testing.assert_close(graphed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@on_gpu
def test_backward_through_a_stale_graph_raises_on_a_device():
    net, decor = on_device(True)
    for x in batches(6):
        loss = net(x.cuda()).square().mean()
        decor.step()
    assert decor._graphs._replays
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.gpu
@on_gpu
def test_a_capture_that_fails_on_a_device_leaves_everything_usable(monkeypatch):
    real = update_module.local_updates

    def waits(jobs, gate):
        updates = real(jobs, gate)
        if torch.cuda.is_current_stream_capturing():
            updates[0].update.loss.sum().item()
        return updates

    monkeypatch.setattr(update_module, "local_updates", waits)
    (plain, expected), (net, decor) = on_device(False), on_device(True)
    stream = torch.cuda.current_stream()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in batches(6):
            for model, update in ((plain, expected), (net, decor)):
                model(x.cuda())
                update.step()
    assert ["could not be captured" in str(warning.message) for warning in told].count(True) == 1
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.ones(1 << 24, device="cuda").sum().item() == 1 << 24
    torch.testing.assert_close(net[0].R, plain[0].R)
