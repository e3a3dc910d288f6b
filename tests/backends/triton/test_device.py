"""What only a device shows: CUDA graphs, streams, memory, other devices than the current one."""

import pytest
import torch
from helpers import case, error

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import reference
from dbp_kernels.backends.triton import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        runtime.INTERPRET or not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
CASES = {
    "3x3": case(16, 64, (28, 28), 3, padding=1),
    "stem": case(16, 3, (56, 56), 7, stride=2, padding=3),
    "1x1": case(16, 128, (14, 14), 1),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())
RULE = (0.1, 0.4, "standard", True)


@pytest.fixture(autouse=True)
def _triton():
    with dbp.backend("triton"):
        yield


def inputs(c, dtype=torch.bfloat16, seed=0):
    return c.input(dtype, seed, layout="channels_last").cuda(), c.R(torch.float32).cuda()


def everything(x, R, c):
    S = torch.ops.dbp.patch_gram(x, *c.arguments)
    C, V = torch.ops.dbp.decor_stats(x, R, *c.arguments)
    R_new, loss = torch.ops.dbp.decor_update(x, R, *c.arguments, *RULE)
    return S, C, V, R_new, loss


def exact(x, R, c):
    high = x.double(), R.double(), *c.arguments
    S = reference.patch_gram(x.double(), *c.arguments)
    return S, *reference.decor_stats(*high), *reference.decor_update(*high, *RULE)


def assert_right(got, x, R, c):
    for g, e in zip(got, exact(x, R, c)):
        assert error(g, e.reshape(g.shape)) < 1e-4


@every_case
def test_graph_capture_and_replay(c):
    """Captured after one call (which makes the tables), replayed on other data."""
    x, R = inputs(c)
    everything(x, R, c)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(x, R, c)
    for seed in (1, 2):
        fresh, _ = inputs(c, seed=seed)
        x.copy_(fresh)
        for g in got:
            g.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_right(got, x, R, c)


@every_case
def test_a_stream_of_ones_own(c):
    """Work is queued on the current stream: behind a long wait it still sees the late input."""
    x, R = inputs(c)
    everything(x, R, c)
    torch.cuda.synchronize()
    late, _ = inputs(c, seed=3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(late)
        got = everything(x, R, c)
    stream.synchronize()
    assert_right(got, late, R, c)


@every_case
def test_no_wait_for_the_device(c):
    x, R = inputs(c)
    everything(x, R, c)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(x, R, c)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_case
def test_peak_memory(c):
    """Beyond S at most the packed input and one workspace of 64 MB with its S."""
    from bench.core.memory import extra_bytes

    x, _ = inputs(c)
    call = lambda: torch.ops.dbp.patch_gram(x, *c.arguments)  # noqa: E731
    call()
    padded = x.numel() * x.element_size() * (8 if c.channels < 8 else 1)
    assert extra_bytes(call, "cuda") <= padded + (1 << 26) + 4 * c.geometry.dim**2 + (1 << 20)


def test_a_whole_step_under_autocast():
    """decorrelate, forward, backward, update: R as the float64 definition has it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(dnn.DecorConv2d(16, 16, 3, padding=1) for _ in range(3)), torch.nn.Flatten()
    ).cuda()
    net = net.to(memory_format=torch.channels_last)
    decor = dbp.DecorUpdate(net, lr=1e-2, sample=1.0)
    x = torch.randn(8, 16, 12, 12, device="cuda").contiguous(memory_format=torch.channels_last)
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, y: seen.append(a[0].detach())) for m in net[:3]]
    with torch.autocast("cuda", torch.bfloat16):
        loss = net(x).square().mean()
    loss.backward()
    before = [m.R.clone() for m in net[:3]]
    decor.step()
    for hook in hooks:
        hook.remove()
    for layer, R, z in zip(net[:3], before, seen):
        z = z.bfloat16() if z.dtype == torch.float32 else z
        window = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
        R_new, _ = reference.decor_update(z.double(), R.double(), *window, 1e-2, 0.5)
        assert error(layer.R - R, (R_new - R.double()).reshape(R.shape)) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    c = CASES["3x3"]
    x, R = (t.to("cuda:1") for t in inputs(c))
    got = everything(x, R, c)
    assert all(g.device == x.device for g in got)
    assert_right(got, x, R, c)
