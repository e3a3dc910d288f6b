"""Which images a DecorUpdate copies, in which form, and where it can or should copy none."""

import pytest
import torch
from decor_layers import samples_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import sampling


@pytest.mark.parametrize(
    ("sample", "batch", "taken"),
    [(0.1, 8, 1), (0.1, 25, 2), (0.5, 5, 2), (1.0, 5, 5), (1, 5, 1), (3, 5, 3), (9, 5, 5)],
)
def test_sample_size(sample, batch, taken):
    layer = dnn.DecorConv2d(2, 3, 3)
    update = dbp.DecorUpdate(layer, sample=sample)
    x = torch.randn(batch, 2, 5, 5)
    layer(x)
    ((copied,),) = samples_of(update)
    assert torch.equal(copied, x[:taken])
    layer(x[0])  # an unbatched image is one image
    assert samples_of(update)[0][1].shape == (1, 2, 5, 5)


def test_empty_batch_is_no_sample():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    layer(torch.randn(0, 3))
    assert samples_of(update) == [[]]
    update.step()
    assert torch.equal(layer.R, torch.eye(3))
    assert update.losses() == {}


def test_random_sampling_draws_distinct_images_reproducibly():
    layer = dnn.DecorLinear(3, 2)
    x = torch.arange(60.0).reshape(20, 3)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        update = dbp.DecorUpdate(layer, sample=6, sampling="random")
        state = torch.get_rng_state()
        layer(x)
        layer(x)
        assert torch.equal(state, torch.get_rng_state())  # training's own stream is untouched
        draws.append(samples_of(update)[0])
    for first, second in zip(*draws):
        assert torch.equal(first, second)
        assert len(first.unique(dim=0)) == 6
    assert not torch.equal(draws[0][0], draws[0][1])


def test_samples_are_copies_without_a_graph():
    layer = dnn.DecorConv2d(2, 3, 3)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(4, 2, 5, 5, requires_grad=True)
    h = x * 2
    layer(h)
    before = h.detach().clone()
    with torch.no_grad():
        h.zero_()
    ((copied,),) = samples_of(update)
    assert torch.equal(copied, before)
    assert not copied.requires_grad
    assert copied.grad_fn is None
    assert copied.untyped_storage().nbytes() == copied.numel() * 4
    update.discard()
    big = torch.randn(64, 2, 5, 5)
    layer(big)
    assert samples_of(update)[0][0].untyped_storage().data_ptr() != big.untyped_storage().data_ptr()


def test_channels_last_samples_stay_channels_last():
    layer = dnn.DecorConv2d(4, 3, 3)
    update = dbp.DecorUpdate(layer, sample=2)
    layer(torch.randn(8, 4, 5, 5).to(memory_format=torch.channels_last))
    assert samples_of(update)[0][0].is_contiguous(memory_format=torch.channels_last)


def test_eval_mode_no_optimiser_and_no_gradients_copy_nothing():
    layer = dnn.DecorLinear(3, 2)
    layer(torch.randn(4, 3))
    update = dbp.DecorUpdate(layer)
    layer.eval()
    layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    update.step()
    assert torch.equal(layer.R, torch.eye(3))
    layer.train()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    layer(torch.randn(4, 3))
    assert len(samples_of(update)[0]) == 1
    update.zero_grad()
    assert len(samples_of(update)[0]) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    net = nn.Sequential(dnn.DecorLinear(4, 4), nn.ReLU(), dnn.DecorLinear(4, 4))
    update = dbp.DecorUpdate(net, sample=0.5)
    x = torch.randn(8, 4, requires_grad=True)
    out = checkpoint(net, x, use_reentrant=reentrant)
    assert [len(s) for s in samples_of(update)] == [1, 1]
    out.sum().backward()
    assert [len(s) for s in samples_of(update)] == [1, 1]
    assert not any(s[0].requires_grad for s in samples_of(update))


class Reversed(torch.autograd.Function):
    """A checkpoint of somebody else's."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.save_for_backward(x)
        ctx.net = net
        return net(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.net(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


def test_a_function_that_runs_layers_again_counts_once():
    layer = dnn.DecorLinear(4, 4)
    update = dbp.DecorUpdate(layer, sample=0.5)
    Reversed.apply(torch.randn(8, 4, requires_grad=True), layer).sum().backward()
    assert [len(s) for s in samples_of(update)] == [1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_without_gradients_copies_nothing(backend):
    torch._dynamo.reset()
    layer = dnn.DecorLinear(4, 4)
    update = dbp.DecorUpdate(layer, sample=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            compiled(torch.randn(8, 4))
    assert samples_of(update) == [[]]
    compiled(torch.randn(8, 4)).sum().backward()
    assert [len(s) for s in samples_of(update)] == [1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_in_a_reentrant_checkpoint_counts_once(backend):
    torch._dynamo.reset()
    layer = dnn.DecorLinear(4, 4)
    update = dbp.DecorUpdate(layer, sample=0.5)
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(8, 4, requires_grad=True)
    checkpoint(compiled, x, use_reentrant=True).sum().backward()
    assert [len(s) for s in samples_of(update)] == [1]


def test_checkpointing_under_compile_counts_once():
    torch._dynamo.reset()
    layer = dnn.DecorLinear(4, 4)
    update = dbp.DecorUpdate(layer, sample=0.5)

    def net(x):
        return checkpoint(lambda v: layer(v).relu(), x, use_reentrant=False)

    x = torch.randn(8, 4, requires_grad=True)
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert [len(s) for s in samples_of(update)] == [1]
    assert torch.equal(samples_of(update)[0][0], x[:4])


def test_a_trace_takes_no_samples():
    layer = dnn.DecorConv2d(2, 3, 3)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(4, 2, 5, 5)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert samples_of(update) == [[]]
    torch.testing.assert_close(traced(x), layer(x))
    update.discard()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    assert samples_of(update) == [[]]
    exported = torch.export.export(layer, (x,))
    assert samples_of(update) == [[]]
    assert "record" not in str(exported.graph)


def test_capturing_a_cuda_graph_by_hand_raises(monkeypatch):
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    monkeypatch.setattr(sampling, "_capturing", lambda input: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        layer(torch.randn(4, 3))
    layer.eval()
    layer(torch.randn(4, 3))
    layer.train()
    update.detach()
    layer(torch.randn(4, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_capturing_a_cuda_graph_on_a_device():
    layer = dnn.DecorLinear(3, 2).cuda()
    update = dbp.DecorUpdate(layer)
    x = torch.randn(4, 3, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)
    assert len(samples_of(update)[0]) == 1


def test_the_recording_op_stays_out_of_the_compilers_cuda_graphs():
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.dbp_nn.record.default.tags
