"""DecorUpdate: samples taken once and only when wanted, the exact update, a real optimiser."""

import copy
import gc
import io
import pickle
import random
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dbp_kernels as dbp
from dbp_kernels import backends, rules, sampling
from dbp_kernels import nn as dnn
from dbp_kernels.optim import step as jobs_module
from dbp_kernels.optim import write_back

D64 = torch.float64


def patches(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(groups, n, D): the layer's patches, from the definition."""
    if isinstance(layer, dnn.Decorrelate):
        return x.reshape(1, -1, layer.num_features)
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.ConvTranspose2d):
        rows = x.movedim(1, -1).reshape(-1, layer.groups, x.shape[1] // layer.groups)
        return rows.transpose(0, 1)
    dims = len(layer.kernel_size)
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, pads, mode=mode)
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.movedim(1, 1 + dims)  # (N, *output, C, *kernel)
    size = layer.weight[0].numel()
    return x.reshape(-1, layer.groups, size).transpose(0, 1)


def expected(
    Z: torch.Tensor, R: torch.Tensor, lr: float, kappa: float, rule="standard", demean=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_new and loss by the formulas of the paper, from patches (groups, n, D)."""
    shape, R = R.shape, R.reshape(-1, *R.shape[-2:]).to(D64)
    Z = Z.to(D64)
    results, losses = [], []
    for z, r in zip(Z, R):
        if demean:
            z = z - z.mean(0)
        x = z @ r.T
        size = r.shape[0]
        M = x.T @ x / len(x)
        C = M - M.diag().diag()
        v = M.diag() - 1
        if rule == "standard":
            step = (1 - kappa) * C + kappa * v.diag()
            losses.append(((1 - kappa) * C.square().sum() + kappa * v.square().sum()) / size**2)
        else:
            weight = (1 - kappa) / (size - 1) if size > 1 else 0.0
            step = weight * C + 2 * kappa * v.diag()
            losses.append((weight * C.square().sum() + kappa * v.square().sum()) / size)
        results.append(r - lr * step @ r)
    return torch.stack(results).reshape(shape), torch.stack(losses).mean()


LAYERS = [
    (dnn.DecorLinear(5, 4), (8, 5)),
    (dnn.DecorLinear(5, 4), (8, 3, 5)),
    (dnn.DecorConv1d(4, 6, 3, stride=2, padding=2, dilation=2), (8, 4, 11)),
    (dnn.DecorConv2d(2, 4, 3), (8, 2, 6, 7)),
    (dnn.DecorConv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (8, 4, 7, 6)),
    (dnn.DecorConv2d(2, 4, (2, 3), padding="same", padding_mode="reflect"), (8, 2, 5, 6)),
    (dnn.DecorConv2d(3, 3, 3, groups=3, padding="same"), (8, 3, 5, 6)),
    (dnn.DecorConv3d(2, 4, 2, padding=1, padding_mode="circular"), (8, 2, 3, 4, 3)),
    (dnn.DecorConvTranspose2d(6, 4, 3, stride=2, groups=2), (8, 6, 4, 3)),
    (dnn.Decorrelate(12), (8, 3, 2, 2)),
]


def fresh(layer: nn.Module, dtype=D64) -> nn.Module:
    layer = copy.deepcopy(layer).to(dtype)
    layer.R.add_(torch.randn_like(layer.R) * 0.1)
    return layer


def samples_of(update: dbp.DecorUpdate) -> list[list[torch.Tensor]]:
    return [r.samples for group in update._recorders for r in group]


@pytest.mark.parametrize("options", [{}, {"rule": "normalized", "kappa": 0.3, "demean": True}])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_step_is_the_update_of_the_paper(layer, shape, options):
    layer = fresh(layer)
    R = layer.R.clone()
    buffer = layer.R
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=0.5, **options)
    x = torch.randn(shape, dtype=D64) + 0.3
    layer(x)
    update.step()
    R_new, loss = expected(patches(layer, x[:4]), R, **{"lr": 1e-2, "kappa": 0.5, **options})
    assert layer.R is buffer
    torch.testing.assert_close(layer.R, R_new, rtol=1e-10, atol=1e-12)
    (reported,) = update.losses().values()
    assert reported.shape == ()
    torch.testing.assert_close(reported, loss, rtol=1e-8, atol=1e-12)
    assert samples_of(update) == [[]]


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


def test_eval_mode_and_no_optimiser_copy_nothing():
    layer = dnn.DecorLinear(3, 2)
    layer(torch.randn(4, 3))
    update = dbp.DecorUpdate(layer)
    layer.eval()
    layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    update.step()
    assert torch.equal(layer.R, torch.eye(3))
    layer.train()
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert len(samples_of(update)[0]) == 1
    update.zero_grad()
    assert len(samples_of(update)[0]) == 1


def test_frozen_weights_keep_their_R():
    """Nobody would make up for what a change of R does to the layer's function."""
    layer = dnn.DecorLinear(3, 2).requires_grad_(False)
    update = dbp.DecorUpdate(layer, lr=0.1)
    layer(torch.randn(4, 3))
    update.step()
    assert torch.equal(layer.R, torch.eye(3))
    layer.requires_grad_(True)
    layer(torch.randn(4, 3))
    update.step()
    assert not torch.equal(layer.R, torch.eye(3))


def test_gradient_accumulation_counts_all_patches():
    layer = fresh(dnn.DecorConv2d(2, 3, 3))
    R = layer.R.clone()
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=0.5)
    a, b = torch.randn(8, 2, 5, 5, dtype=D64), torch.randn(4, 2, 5, 5, dtype=D64) * 3
    layer(a).sum().backward()
    layer(b).sum().backward()
    update.step()
    Z = torch.cat([patches(layer, a[:4]), patches(layer, b[:2])], 1)
    torch.testing.assert_close(layer.R, expected(Z, R, 1e-2, 0.5)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("demean", [False, True])
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (
            dnn.DecorConv2d(2, 4, 3, stride=2, padding=1, groups=2),
            [(4, 2, 5, 5), (2, 2, 7, 4), (3, 2, 5, 5)],
        ),
        (dnn.DecorConv2d(2, 3, (2, 3), padding="same"), [(4, 2, 5, 5), (2, 2, 7, 4)]),
        (dnn.DecorConv1d(2, 3, 3, padding="valid", dilation=2), [(4, 2, 9), (2, 2, 6)]),
        (dnn.DecorLinear(4, 3), [(5, 4), (2, 3, 4), (2, 6, 4)]),
        (dnn.DecorConvTranspose2d(4, 3, 3), [(2, 4, 5, 5), (3, 4, 2, 6)]),
    ],
)
def test_shared_layer_on_inputs_of_different_shapes(layer, shapes, demean):
    layer = fresh(layer)
    R = layer.R.clone()
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0, demean=demean)
    inputs = [torch.randn(shape, dtype=D64) + 0.5 for shape in shapes]
    for x in inputs:
        layer(x)
    update.step()
    Z = torch.cat([patches(layer, x) for x in inputs], 1)
    R_new, loss = expected(Z, R, 1e-2, 0.5, demean=demean)
    torch.testing.assert_close(layer.R, R_new, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(next(iter(update.losses().values())), loss)


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


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_samples_are_what_autocast_has_the_layer_compute_with(layer, shape):
    layer = copy.deepcopy(layer)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(shape)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        with torch.autocast("cpu", enabled=False):
            layer(x)
    with torch.autocast("cpu", torch.float16):
        layer(x)
    (samples,) = samples_of(update)
    for sample, expected in zip(samples, (x, x.bfloat16(), x, x.half()), strict=True):
        assert sample.dtype == expected.dtype
        assert torch.equal(sample.reshape(shape), expected)


def test_random_samples_are_too():
    layer = dnn.DecorLinear(5, 4)
    update = dbp.DecorUpdate(layer, sample=4, sampling="random")
    x = torch.randn(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    ((sample,),) = samples_of(update)
    assert sample.dtype == torch.bfloat16
    assert set(map(tuple, sample.tolist())) < set(map(tuple, x.bfloat16().tolist()))


def test_autocast_leaves_samples_of_float64_alone():
    layer = dnn.DecorLinear(5, 4, dtype=D64)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(8, 5, dtype=D64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(samples_of(update)[0][0], x)


def test_samples_in_half_precision_are_copies():
    layer = dnn.DecorLinear(5, 4)
    update = dbp.DecorUpdate(layer, sample=1.0)
    x = torch.randn(8, 5, dtype=torch.bfloat16)
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    x.zero_()
    assert torch.equal(samples_of(update)[0][0], before)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_samples_under_autocast_of_compiled_code(inside):
    net = nn.Sequential(dnn.DecorConv2d(2, 4, 3), nn.Flatten(), dnn.DecorLinear(4, 3))
    update = dbp.DecorUpdate(net, lr=1e-2, sample=1.0)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    x = torch.randn(8, 2, 3, 3)
    if inside:
        torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    first, second = samples_of(update)
    assert first[0].dtype == second[0].dtype == torch.bfloat16
    assert torch.equal(first[0], x.bfloat16())
    update.step()
    assert not torch.equal(net[0].R, torch.eye(18))


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


def test_update_every():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, update_every=3, sample=2)
    for step in range(7):
        before = layer.R.clone()
        layer(torch.randn(4, 3))
        assert len(samples_of(update)[0]) == (step % 3 == 0)
        update.step()
        assert torch.equal(before, layer.R) == (step % 3 != 0)


def test_autocast_statistics_are_float32():
    layer, other = dnn.DecorLinear(16, 4), dnn.DecorLinear(16, 4)
    updates = [dbp.DecorUpdate(m, lr=1e-2, sample=1.0) for m in (layer, other)]
    x = torch.randn(64, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        updates[0].step()
    other(x.float())
    updates[1].step()
    torch.testing.assert_close(layer.R, other.R, rtol=1e-6, atol=1e-6)
    # The path through second moments, too.
    conv = dnn.DecorConv2d(2, 3, 3)
    update = dbp.DecorUpdate(conv, lr=1e-2, sample=1.0)
    a, b = torch.randn(4, 2, 6, 6).bfloat16(), torch.randn(4, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        conv(a), conv(b)
        update.step()
    Z = torch.cat([patches(conv, a.float()), patches(conv, b.float())], 1)
    R_new, _ = expected(Z, torch.eye(18), 1e-2, 0.5)
    torch.testing.assert_close(conv.R, R_new.float(), rtol=1e-6, atol=1e-6)


class NoHostSync(TorchDispatchMode):
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.split("::")[1] not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


def test_step_and_losses_do_not_wait_for_the_device():
    net = nn.Sequential(
        dnn.DecorConv2d(2, 3, 3), nn.Flatten(), dnn.DecorLinear(27, 4), dnn.DecorLinear(4, 2)
    )
    update = dbp.DecorUpdate(net, sample=0.5)
    for _ in range(2):
        net(torch.randn(8, 2, 5, 5))
        net[3](torch.randn(2, 3, 4))
        with NoHostSync():
            update.step()
            update.losses(), update.skipped()


@pytest.mark.parametrize("size", [3, 300])  # a large R is changed in place
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_batch_is_skipped_and_counted(bad, size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, 2))
    update = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
    net(torch.randn(4, size))
    update.step()
    before = [m.R.clone() for m in net]
    x = torch.randn(4, size)
    x[1, 2] = bad
    net[0](x)
    net[1](torch.randn(4, size))
    update.step()
    assert torch.equal(net[0].R, before[0])
    assert not torch.equal(net[1].R, before[1])
    assert {k: int(v) for k, v in update.skipped().items()} == {"0": 1, "1": 0}
    assert not update.losses()["0"].isfinite()
    assert update.losses()["1"].isfinite()
    net(torch.randn(4, size))
    update.step()
    assert not torch.equal(net[0].R, before[0])
    assert update.losses()["0"].isfinite()
    assert net[0].R.isfinite().all()
    assert int(update.skipped()["0"]) == 1


@pytest.mark.parametrize("size", [3, 300])
def test_an_error_leaves_every_R_as_it_was(size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, 2))
    update = dbp.DecorUpdate(net, lr=0.1)
    net(torch.randn(4, size))
    samples_of(update)[1][0] = torch.randn(4, 7)  # what a broken backend would meet
    with pytest.raises((RuntimeError, ValueError)):
        update.step()
    assert all(torch.equal(m.R, torch.eye(size)) for m in net)
    assert samples_of(update) == [[], []]
    assert update._steps == 0


def test_few_samples_change_a_large_R_in_place():
    """No other D x D tensor is made, which would cost memory and passes over it."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != layer.R.data_ptr():
                largest.append(result.numel())
            return result

    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=1e-3, sample=1.0)
    x = torch.randn(4, 300)
    layer(x)
    with Sizes():
        update.step()
    assert 0 < max(largest) < 300 * 300
    R, _ = expected(x[None], torch.eye(300), 1e-3, 0.5)
    torch.testing.assert_close(layer.R, R.float(), rtol=1e-5, atol=1e-6)


LARGE = [
    (dnn.DecorLinear(300, 2), (4, 300)),
    (dnn.DecorConv2d(64, 4, 3, groups=2), (2, 64, 4, 4)),
    (dnn.DecorConv3d(35, 4, 2), (3, 35, 2, 2, 3)),
]


@pytest.mark.parametrize("decided", [None, lambda accept: accept.unbind()], ids=["CPU", "GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("demean", [False, True])
@pytest.mark.parametrize("batches", [1, 100])
def test_large_layers_in_place(batches, dtype, demean, decided, monkeypatch):
    """As on a CPU, and by tensors that decide, as on a GPU; one of the layers is poisoned.

    One batch has fewer patches than D, a hundred have more, which is for other plans.
    """
    if decided:
        monkeypatch.setattr(write_back, "_decided", decided)
    kind = rules.LowRankUpdate if batches == 1 else rules.ProductUpdate
    used, apply_ = [], kind.apply_
    monkeypatch.setattr(kind, "apply_", lambda self, R: used.append(R) or apply_(self, R))
    net = nn.ModuleList(fresh(layer, dtype) for layer, _ in [*LARGE, LARGE[0]])
    update = dbp.DecorUpdate(net, lr=1e-2, kappa=0.3, sample=1.0, demean=demean)
    before = [layer.R.clone() for layer in net]
    shapes = [(batches * images, *rest) for _, (images, *rest) in [*LARGE, LARGE[0]]]
    # what autocast rounds the samples to
    inputs = [torch.randn(shape).bfloat16().to(dtype) for shape in shapes]
    inputs[-1][0, 0] = float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        for layer, x in zip(net, inputs):
            layer(x)
        update.step()
    changed = net if decided else net[:-1]  # a GPU's poisoned update changes R by nothing
    assert [R.data_ptr() for R in used] == [layer.R.data_ptr() for layer in changed]
    assert [int(v) for v in update.skipped().values()] == [0, 0, 0, 1]
    assert torch.equal(net[-1].R, before[-1])
    tolerance = 1e-12 if dtype == D64 else 1e-5
    for layer, x, R, loss in zip(net[:-1], inputs, before, update.losses().values()):
        R_new, expected_loss = expected(patches(layer, x), R, 1e-2, 0.3, demean=demean)
        torch.testing.assert_close(layer.R.to(D64), R_new, rtol=0, atol=tolerance)
        torch.testing.assert_close(loss.to(D64), expected_loss, rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
def test_a_step_size_beyond_all_numbers_is_skipped(images):
    """Statistics, loss and M' R are finite, but not their product with it."""
    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=1e36, sample=1.0)
    layer(30 * torch.randn(images, 300))
    update.step()
    assert [int(v) for v in update.skipped().values()] == [1]
    assert torch.equal(layer.R, torch.eye(300))


HOSTILE = [float("nan"), float("inf"), -float("inf"), 1e38, 1e25, 1e18, 1e-18, 1e-38]


@pytest.mark.parametrize("decided", [None, lambda accept: accept.unbind()], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
@pytest.mark.parametrize("size", [3, 300], ids=["R_new", "in place"])
def test_whatever_is_fed_R_stays_finite_or_as_it_was(size, images, decided, monkeypatch):
    """One entry, or all, of the samples or of R, and the step size, are anything there is."""
    if decided:
        monkeypatch.setattr(write_back, "_decided", decided)
    feed_anything(size, images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images", [4, 280, 700], ids=["samples", "direct", "gram"])
@pytest.mark.parametrize("size", [3, 300])
def test_whatever_is_fed_on_a_device(size, images):
    feed_anything(size, images, "cuda")


def feed_anything(size: int, images: int, device: str = "cpu") -> None:
    cases = [
        (value, where, everywhere, lr, kappa, rule)
        for value in HOSTILE
        for where in ("x", "R")
        for everywhere in (False, True)
        for lr in (1e-3, 1e20, 1e38)
        for kappa in (0.0, 0.5, 1.0)
        for rule in ("standard", "normalized")
        if where == "x" or abs(value) <= 1e30  # R is far from the largest number, or is no number
    ]
    outcomes = set()
    for value, where, everywhere, lr, kappa, rule in random.Random(0).sample(cases, 60):
        layer = dnn.DecorLinear(size, 2, device=device)
        update = dbp.DecorUpdate(layer, lr=lr, kappa=kappa, rule=rule, sample=1.0)
        x = torch.randn(images, size, device=device)
        (x if where == "x" else layer.R)[... if everywhere else (1, 2)] = value
        layer(x)
        before = layer.R.clone()
        update.step()
        (skipped,), (loss,) = update.skipped().values(), update.losses().values()
        same = torch.equal(layer.R.nan_to_num(7.0), before.nan_to_num(7.0))
        assert same if skipped else layer.R.isfinite().all() and loss.isfinite()
        outcomes.add((int(skipped), same))
    assert {(0, False), (1, True)} <= outcomes


def test_writing_back_on_a_GPU_launches_one_kernel_per_layer(monkeypatch):
    """The choice between its update and its R; the checks are one call however many there are."""
    monkeypatch.setattr(write_back, "_decided", lambda accept: accept.unbind())
    views = {"aten.view.default", "aten.unbind.int", "aten.alias.default"}
    launches = []
    for layers in (2, 9):
        net = nn.ModuleList(dnn.DecorLinear(16, 2) for _ in range(layers))
        update = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
        for _ in range(2):  # the first time makes the reports
            for layer in net:
                layer(torch.randn(4, 16))
            with torch.no_grad():
                worked_out = update._work_out(*update._due_jobs())
                with Calls() as calls:
                    update._carry_out(*worked_out)
            update.discard()
        counted = Counter(calls.names)
        assert counted.pop("aten.where.self_out") == layers
        launches.append({name: n for name, n in counted.items() if name not in views})
    assert launches[0] == launches[1]
    assert sum(launches[0].values()) < 14


@pytest.mark.parametrize("size", [3, 300])
def test_options_set_by_hand_are_checked_by_step(size):
    net = nn.Sequential(dnn.DecorLinear(size, size), dnn.DecorLinear(size, size))
    update = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    update.param_groups[0]["lr"] = -0.1
    net(torch.randn(4, size))
    with pytest.raises(ValueError, match=r"lr=-0\.1"):
        update.step()
    update.param_groups[0]["lr"] = 0.1
    net[1].R = net[1].R.half()
    net[0](torch.randn(4, size))
    net[1](torch.randn(4, size))
    with pytest.raises(TypeError, match=r"R has dtype torch\.float16"):
        update.step()
    assert torch.equal(net[0].R, torch.eye(size))


def test_a_layer_changed_by_hand_is_seen_as_it_is_now():
    layer = fresh(dnn.DecorConv2d(2, 3, 3, padding="same", padding_mode="reflect"))
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0)
    x = torch.randn(2, 2, 6, 6, dtype=D64)
    for change in ({}, {"padding": 0, "stride": [2, 1]}, {"dilation": (2, 2)}):
        for name, value in change.items():
            setattr(layer, name, value)
        before = layer.R.clone()
        layer(x)
        update.step()
        padded = x if layer.padding == 0 else nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        S = dbp.patch_gram(padded, 3, layer.stride, 0, layer.dilation)
        R, _ = rules.update_from_gram(S, before[None], 0.1, 0.5)
        torch.testing.assert_close(layer.R, R[0], rtol=1e-10, atol=1e-12)


def test_step_before_backward_is_an_error_not_a_wrong_gradient():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    loss = layer(torch.randn(4, 3)).sum()
    update.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_of_different_dtypes_and_one_poisoned():
    net = nn.ModuleList([dnn.DecorLinear(3, 2), dnn.DecorLinear(3, 2, dtype=D64)])
    update = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    x = torch.randn(4, 3)
    net[0](x * float("nan"))
    net[1](x.double())
    update.step()
    assert torch.equal(net[0].R, torch.eye(3))
    torch.testing.assert_close(net[1].R, expected(x[None], torch.eye(3), 0.1, 0.5)[0])
    assert [v.dtype for v in update.losses().values()] == [torch.float32, D64]


def test_a_layer_without_samples_is_left_alone():
    net = nn.ModuleList([dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2)])
    update = dbp.DecorUpdate(net, lr=0.1)
    net[0](torch.randn(4, 3))
    update.step()
    assert list(update.losses()) == ["0"]
    assert torch.equal(net[1].R, torch.eye(3))
    assert not torch.equal(net[0].R, torch.eye(3))


def test_closure():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)

    def closure():
        loss = layer(torch.randn(4, 3)).sum()
        loss.backward()
        return loss

    assert update.step(closure).requires_grad
    assert layer.weight.grad is not None
    assert not torch.equal(layer.R, torch.eye(3))


# A real optimiser.


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
        ({"lr": torch.tensor(0.1)}, "lr"),
        ({"lr": "0.1"}, "lr"),
        ({"kappa": 1.5}, "kappa"),
        ({"kappa": None}, "kappa"),
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


# Life cycle.


def test_a_dropped_optimiser_stops_the_copies_at_once():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    layer(torch.randn(4, 3))
    sample = weakref.ref(samples_of(update)[0][0])
    gc.disable()
    try:
        del update
        assert sample() is None
        layer(torch.randn(4, 3))
    finally:
        gc.enable()


def test_detach():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer)
    layer(torch.randn(4, 3))
    update.detach()
    assert samples_of(update) == [[]]
    assert layer._recorder is None
    layer(torch.randn(4, 3))
    assert samples_of(update) == [[]]
    with pytest.raises(RuntimeError, match=r"DecorLinear.*no longer belongs"):
        update.step()
    update.close()


def test_a_second_optimiser_takes_the_layer_over():
    layer = dnn.DecorLinear(3, 2)
    first = dbp.DecorUpdate(layer, lr=0.1)
    second = dbp.DecorUpdate(layer, lr=0.1)
    layer(torch.randn(4, 3))
    assert samples_of(first) == [[]]
    with pytest.raises(RuntimeError, match="later DecorUpdate"):
        first.step()
    first.detach()
    second.step()
    assert not torch.equal(layer.R, torch.eye(3))


def test_it_follows_the_model_to_another_dtype():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    layer(torch.randn(4, 3))
    update.step()
    losses = update.losses()
    layer.double()
    assert update.losses().keys() == losses.keys()
    R = layer.R.clone()
    x = torch.randn(4, 3, dtype=D64)
    layer(x)
    update.step()
    torch.testing.assert_close(layer.R, expected(x[None, :1], R, 0.1, 0.5)[0])
    assert update.param_groups[0]["params"][0] is layer.R
    assert len(update.state) == 1


def train(net, optimiser, decor, data) -> None:
    for x in data:
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()
        decor.step()


def run(seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(dnn.DecorConv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), dnn.DecorLinear(27, 4))
    optimiser = torch.optim.Adam(net.parameters())
    decor = dbp.DecorUpdate(net, lr=1e-2, sample=0.3, sampling="random", update_every=2)
    return net, optimiser, decor


def test_state_dict_restores_a_run_bit_for_bit():
    data = torch.randn(9, 8, 2, 5, 5)
    net, optimiser, decor = run()
    schedule = torch.optim.lr_scheduler.ExponentialLR(decor, 0.9)
    bad = data[0].clone()
    bad[:] = float("inf")
    decor.step(lambda: net(bad))
    schedule.step()
    train(net, optimiser, decor, data[:4])
    buffer = io.BytesIO()
    torch.save([m.state_dict() for m in (net, optimiser, decor)], buffer)
    train(net, optimiser, decor, data[4:])

    net2, optimiser2, decor2 = run(seed=1)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for target, state in zip((net2, optimiser2, decor2), saved):
        target.load_state_dict(state)
    assert {k: int(v) for k, v in decor2.skipped().items()} == {"0": 1, "3": 1}
    assert all(v.dtype == torch.int64 for v in decor2.skipped().values())
    train(net2, optimiser2, decor2, data[4:])
    for a, b in zip(net.state_dict().values(), net2.state_dict().values()):
        assert torch.equal(a, b)
    for a, b in zip(decor.losses().values(), decor2.losses().values()):
        assert torch.equal(a, b)
    assert decor2.param_groups[0]["lr"] == decor.param_groups[0]["lr"]


def test_bad_state_dicts():
    _, _, decor = run()
    before = decor.state_dict()
    with pytest.raises(ValueError, match="generator"):
        decor.load_state_dict({"state": {}, "param_groups": []})
    other = dbp.DecorUpdate(dnn.DecorLinear(3, 2)).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[1\] layers"):
        decor.load_state_dict(other)
    after = decor.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after


def broken_state(state: dict, what: str) -> dict:
    """A good state_dict with another learning rate and step, and one thing wrong."""
    state = copy.deepcopy(state)
    state["steps"] += 1
    state["param_groups"][0]["lr"] = 0.5
    if what == "generator":
        state["generator"] = state["generator"][:7]
    elif what == "generator=None":
        state["generator"] = None
    elif what == "steps":
        state["steps"] = -1
    elif what == "kappa":
        state["param_groups"][0]["kappa"] = 2.0
    elif what == "demean":
        del state["param_groups"][0]["demean"]
    elif what == "skipped":
        del state["state"][1]["skipped"]
    elif what == "layers":
        state["param_groups"][0]["params"].pop()
    elif what == "param_groups":
        state["param_groups"] = None
    return state


@pytest.mark.parametrize(
    "what",
    [
        "generator",
        "generator=None",
        "steps",
        "kappa",
        "demean",
        "skipped",
        "layers",
        "param_groups",
    ],
)
def test_a_bad_state_dict_changes_nothing(what):
    net, optimiser, decor = run()
    train(net, optimiser, decor, torch.randn(3, 8, 2, 5, 5))
    before = copy.deepcopy(decor.state_dict())
    net(torch.randn(8, 2, 5, 5))
    with pytest.raises(ValueError, match=what.split("=")[0]):
        decor.load_state_dict(broken_state(before, what))
    after = decor.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert before["steps"] == after["steps"]
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(value, after["state"][index][key], equal_nan=True)


def test_reports_and_state_dicts_are_snapshots():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0)
    layer(torch.randn(4, 3))
    update.step()
    taken = update.losses()["DecorLinear"], update.state_dict()["state"][0]["loss"]
    value = taken[0].clone()
    saved = update.state_dict()
    update.load_state_dict(saved)
    layer(torch.randn(4, 3) * 9)
    update.step()
    assert [bool(t == value) for t in taken] == [True, True]
    assert saved["state"][0]["loss"] == value
    assert update.losses()["DecorLinear"] != value
    state = update.state[layer.R]
    inside = dict(state)
    layer(torch.randn(4, 3))
    update.step()
    assert all(state[key] is inside[key] for key in inside)  # written in place


# Where nothing can or should be recorded.


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


def test_another_default_device_changes_nothing():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, sample=2, sampling="random")
    x = torch.randn(8, 3)
    with torch.device("meta"):
        layer(x)
        update.step()
    assert layer.R.device.type == "cpu"
    assert not torch.equal(layer.R, torch.eye(3))


def test_step_on_a_device_without_autocast():
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2)).to("meta")
    update = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    net(torch.randn(4, 3, device="meta"))
    update.step()
    assert update.losses()["0"].is_meta


# Layers of equal shape together.


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._schema.name.split("::")[1].rstrip("_") in ("bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


class Calls(TorchDispatchMode):
    """The names of all operators called, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def equal_layers(make, count: int) -> nn.ModuleList:
    layers = nn.ModuleList([make() for _ in range(count)]).to(D64)
    for layer in layers:
        layer.R.add_(torch.randn_like(layer.R) * 0.1)
    return layers


@pytest.mark.parametrize("images", [4, 400])  # few samples and many: other plans
def test_equal_layers_share_their_products(images):
    counts = []
    for layers in (3, 12):
        net = equal_layers(lambda: dnn.DecorLinear(32, 32), layers)
        update = dbp.DecorUpdate(net, lr=1e-2, sample=1.0)
        for layer in net:
            layer(torch.randn(images, 32, dtype=D64))
        with Products() as products:
            update.step()
        counts.append(products.calls)
    assert counts[0] == counts[1] <= 6


@pytest.mark.parametrize("options", [{}, {"rule": "normalized", "kappa": 0.3, "demean": True}])
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("batch", [1, 8])
def test_layers_together_equal_layers_alone(layer, shape, batch, options, monkeypatch):
    net = equal_layers(lambda: copy.deepcopy(layer), 3)
    alone = copy.deepcopy(net)
    xs = [torch.randn(batch, *shape[1:], dtype=D64) + 0.3 for _ in net]
    updates, together = [], []
    original = jobs_module._update_together
    monkeypatch.setattr(
        jobs_module, "_update_together", lambda *a: together.append(a) or original(*a)
    )
    for model, small in ((net, 256), (alone, 0)):
        limits = dict.fromkeys(("gram", "direct", "samples"), small)
        monkeypatch.setattr(jobs_module, "_SMALL", limits)
        updates.append(dbp.DecorUpdate(model, lr=1e-2, sample=1.0, **options))
        for m, x in zip(model, xs):
            m(x)
        updates[-1].step()
    assert len(together) == 1
    for a, b in zip(net, alone):
        torch.testing.assert_close(a.R, b.R, rtol=1e-12, atol=1e-12)
    for name, loss in updates[0].losses().items():
        torch.testing.assert_close(loss, updates[1].losses()[name], rtol=1e-10, atol=1e-12)


def test_only_equal_layers_go_together():
    """Each has a neighbour of another option, dtype, size or number of samples."""
    make = dnn.DecorLinear
    net = nn.ModuleList([make(4, 2), make(4, 3), make(5, 2), make(4, 2), make(4, 2, dtype=D64)])
    groups = [{"modules": [("a", net[0])], "kappa": 0.1}, {"modules": net[1:]}]
    update = dbp.DecorUpdate(groups, lr=0.1, sample=1.0)
    xs = [torch.randn(6 if i == 3 else 2, m.in_features).to(m.R) for i, m in enumerate(net)]
    for layer, x in zip(net, xs):
        layer(x)
    net[4](xs[4])
    update.step()
    for i, (layer, x) in enumerate(zip(net, xs)):
        R, _ = expected(x[None], torch.eye(len(layer.R)), 0.1, 0.5 if i else 0.1)
        torch.testing.assert_close(layer.R, R.to(layer.R.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "name"), [(200_000, "update_from_gram"), (6, "update_direct")])
def test_the_selected_backend_gets_equal_layers_together(rows, name, monkeypatch):
    batches = []

    def spy(Z, R, *rest, **rule):
        batches.append(R.shape)
        return getattr(rules, name)(Z, R, *rest, **rule)

    net = equal_layers(lambda: dnn.DecorLinear(4, 4), 3)
    update = dbp.DecorUpdate(net, sample=1.0)
    for layer in net:
        layer(torch.randn(rows, 4, dtype=D64))
    monkeypatch.setattr(backends.select("cpu"), name, spy)
    update.step()
    assert batches == [(3, 4, 4)]


@pytest.mark.parametrize("demean", [False, True])
def test_few_patches_of_different_shapes_become_rows(demean, monkeypatch):
    layer = fresh(dnn.DecorConv2d(8, 4, 3, groups=2, padding=1, padding_mode="reflect"))
    R = layer.R.clone()
    monkeypatch.setattr(jobs_module, "moments_of", None)
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0, demean=demean)
    inputs = [torch.randn(1, 8, h, w, dtype=D64) + 0.5 for h, w in ((2, 3), (4, 2), (3, 3))]
    for x in inputs:
        layer(x)
    update.step()
    Z = torch.cat([patches(layer, x) for x in inputs], 1)
    R_new, loss = expected(Z, R, 1e-2, 0.5, demean=demean)
    torch.testing.assert_close(layer.R, R_new, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(next(iter(update.losses().values())), loss)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_together_with_the_model(copier):
    data = torch.randn(6, 8, 2, 5, 5)
    net, optimiser, decor = run()
    train(net, optimiser, decor, data[:3])
    net(data[0])
    net2, decor2 = copier((net, decor))
    decor.discard()
    assert samples_of(decor2) == [[], []]
    for model, update in ((net, decor), (net2, decor2)):
        for x in data[3:]:
            model(x)
            update.step()
    for a, b in zip(net.state_dict().values(), net2.state_dict().values()):
        assert torch.equal(a, b)
    assert net2[0].R is not net[0].R
    assert decor2.param_groups[0]["params"][0] is net2[0].R


def test_training_decorrelates():
    torch.manual_seed(0)
    layer = dnn.DecorLinear(8, 4)
    mixing = torch.randn(8, 8) / 8**0.5
    update = dbp.DecorUpdate(layer, lr=0.05, sample=1.0)
    losses = []
    for _ in range(100):
        layer(torch.randn(64, 8) @ mixing)
        update.step()
        losses.append(float(update.losses()["DecorLinear"]))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
