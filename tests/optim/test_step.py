"""One step of DecorUpdate: the paper's update, whatever the layers, and without waiting."""

import pytest
import torch
from decor_layers import D64, LAYERS, expected, fresh, patches, samples_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import rules
from dbp_kernels.optim import step as jobs_module


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


def test_a_layer_changed_by_hand_is_seen_as_it_is_now():
    layer = fresh(dnn.DecorConv2d(2, 3, 3, padding="same", padding_mode="reflect"))
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0, clip=None)
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


KINDS = [layer for layer in LAYERS if not isinstance(layer[0], dnn.Decorrelate)]


@pytest.mark.parametrize(("layer", "shape"), KINDS)
def test_step_before_backward_is_an_error_that_says_so(layer, shape):
    layer = fresh(layer)
    update = dbp.DecorUpdate(layer, lr=0.1)
    loss = layer(torch.randn(shape, dtype=D64)).sum()
    update.step()
    with pytest.raises(RuntimeError, match=r"R of Decor.*call step\(\).* after backward\(\)"):
        loss.backward()


def test_the_order_is_watched_until_it_was_right_once():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    x = torch.randn(4, 3)
    first, second = layer(x), layer(x)
    assert [len(y._backward_hooks) for y in (first, second)] == [1, 1]
    first.sum().backward()
    third = layer(x)
    assert not third._backward_hooks
    update.step()
    with pytest.raises(RuntimeError, match="call step"):
        second.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # torch's own
        third.sum().backward()


def test_the_order_is_not_watched_where_it_does_not_matter():
    layer = dnn.DecorLinear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    assert not layer(x)._backward_hooks  # no optimiser of R
    update = dbp.DecorUpdate(layer, lr=0.1)
    with torch.no_grad():
        assert not layer(x)._backward_hooks
    layer.requires_grad_(False)  # R stays
    layer(x).sum().backward()
    assert not layer._order_known
    layer.requires_grad_(True)
    update.detach()
    assert not layer(x)._backward_hooks


def test_a_checkpointed_pass_is_not_recomputed_with_another_R_unnoticed():
    layer = dnn.DecorLinear(3, 2)
    update = dbp.DecorUpdate(layer, lr=0.1)
    loss = checkpoint(layer, torch.randn(4, 3), use_reentrant=False).sum()
    update.step()
    with pytest.raises(RuntimeError, match="call step"):
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
