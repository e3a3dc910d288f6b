"""dbp_kernels.nn: every layer is its torch layer over decorrelated patches."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

LINEAR = [((5, 4), {}, (3, 5)), ((5, 4), {"bias": False}, (2, 3, 5)), ((5, 4), {}, (5,))]
CONV = {
    1: [
        ((4, 6, 3), {}, (2, 4, 9)),
        ((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2, "dilation": 2}, (2, 4, 9)),
        ((4, 6, 4), {"padding": "same", "bias": False}, (2, 4, 9)),
        ((4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (4, 9)),
    ],
    2: [
        ((4, 6, 3), {}, (2, 4, 7, 8)),
        ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "groups": 2}, (2, 4, 7, 8)),
        ((4, 6, (3, 4)), {"padding": "same", "dilation": 2}, (2, 4, 9, 8)),
        ((4, 6, 3), {"padding": "valid"}, (2, 4, 7, 8)),
        ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 7, 8)),
        ((4, 6, 3), {"padding": "same", "padding_mode": "replicate"}, (2, 4, 7, 8)),
        ((4, 4, 3), {"groups": 4, "bias": False}, (4, 7, 8)),
    ],
    3: [
        ((2, 4, 2), {"padding": 1, "groups": 2}, (2, 2, 4, 5, 3)),
        ((2, 4, (1, 2, 3)), {"padding": "same"}, (2, 4, 5, 3)),
    ],
}
CONV_TRANSPOSE = [
    ((4, 6, 3), {}, (2, 4, 5, 6)),
    ((4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (2, 4, 5, 6)),
    ((4, 6, (2, 3)), {"dilation": 2, "bias": False}, (4, 5, 6)),
]
CASES = [
    *[(dnn.DecorLinear, nn.Linear, *case) for case in LINEAR],
    *[(dnn.DecorConv1d, nn.Conv1d, *case) for case in CONV[1]],
    *[(dnn.DecorConv2d, nn.Conv2d, *case) for case in CONV[2]],
    *[(dnn.DecorConv3d, nn.Conv3d, *case) for case in CONV[3]],
    *[(dnn.DecorConvTranspose2d, nn.ConvTranspose2d, *case) for case in CONV_TRANSPOSE],
]
LAYERS = [
    (dnn.DecorLinear, (5, 4), (6, 5)),
    (dnn.DecorConv1d, (4, 6, 3), (6, 4, 9)),
    (dnn.DecorConv2d, (4, 6, 3), (6, 4, 5, 5)),
    (dnn.DecorConv3d, (2, 4, 2), (6, 2, 3, 3, 3)),
    (dnn.DecorConvTranspose2d, (4, 6, 3), (6, 4, 5, 5)),
]


def random_R(layer: nn.Module) -> None:
    layer.R.copy_(torch.randn_like(layer.R) * 0.3)


def condensed(layer: nn.Module) -> torch.Tensor:
    """A = W R from its definition, by loops over groups."""
    groups = getattr(layer, "groups", 1)
    R = layer.R.reshape(groups, *layer.R.shape[-2:])
    W = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        parts = zip(W.chunk(groups), R)
        return torch.cat([torch.einsum("ij,iokl->jokl", r, w) for w, r in parts])
    parts = zip(W.chunk(groups), R)
    return torch.cat([(w.flatten(1) @ r).reshape(w.shape) for w, r in parts])


@pytest.mark.parametrize(("decor", "plain", "args", "kwargs", "shape"), CASES)
def test_equals_plain_layer_holding_the_condensed_weight(decor, plain, args, kwargs, shape):
    layer = decor(*args, **kwargs, dtype=torch.float64)
    other = plain(*args, **kwargs, dtype=torch.float64)
    assert list(layer.state_dict()) == [*other.state_dict(), "R"]
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "R"})
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)
    random_R(layer)
    other.weight.data = condensed(layer)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_gradients_reach_weight_and_input_but_not_R(decor, args, shape):
    layer = decor(*args, dtype=torch.float64)
    random_R(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.R.grad is None
    assert not layer.R.requires_grad
    gradients = x.grad, layer.weight.grad, layer.bias.grad

    plain = copy.deepcopy(layer)
    plain.reset_decorrelation()
    A = condensed(layer).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    torch.func.functional_call(plain, {"weight": A}, (x2,)).square().sum().backward()
    torch.testing.assert_close(gradients[0], x2.grad)
    R = layer.R
    if decor is dnn.DecorConvTranspose2d:
        dW = torch.einsum("ij,jokl->iokl", R, A.grad)
    else:
        dW = (A.grad.flatten(1) @ R.T).reshape(A.shape)
    torch.testing.assert_close(gradients[1], dW)
    torch.testing.assert_close(gradients[2], plain.bias.grad)


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_R_starts_as_identity_and_keeps_its_precision(decor, args, shape):
    layer = decor(*args)
    assert torch.equal(layer.R, torch.eye(layer.R.shape[-1]))
    random_R(layer)
    before = layer.R.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)):
        cast(layer)
        assert layer.R.dtype == torch.float32
        assert torch.equal(layer.R, before)
        assert layer.weight.dtype != torch.float32
        assert layer(torch.randn(shape, dtype=layer.weight.dtype)).dtype == layer.weight.dtype
    layer.double()
    assert layer.R.dtype == torch.float64
    assert torch.equal(layer.R, before.double())
    layer.half()
    assert layer.R.dtype == torch.float32
    assert torch.equal(layer.R, before)
    assert decor(*args, dtype=torch.bfloat16).R.dtype == torch.float32
    assert decor(*args, dtype=torch.float64).R.dtype == torch.float64


def test_R_shape():
    assert dnn.DecorConv2d(6, 8, (3, 2)).R.shape == (36, 36)
    assert dnn.DecorConv2d(6, 8, 3, groups=2).R.shape == (2, 27, 27)
    assert dnn.DecorConvTranspose2d(6, 8, 3, groups=2).R.shape == (2, 3, 3)
    assert dnn.DecorConvTranspose2d(6, 8, 3).R.shape == (6, 6)
    assert dnn.DecorLinear(6, 8).R.shape == (6, 6)


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_meta_device_and_to_empty(decor, args, shape):
    layer = decor(*args, device="meta")
    assert layer.R.is_meta
    assert layer.half().R.dtype == torch.float32
    layer.to_empty(device="cpu")
    assert torch.equal(layer.R, torch.eye(layer.R.shape[-1]))
    with torch.device("meta"):
        assert decor(*args).R.is_meta


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_signature_repr_and_subclass(decor, args, shape):
    plain = dnn.plain_class(decor)
    assert issubclass(decor, plain)
    assert plain.__module__.startswith("torch.nn")
    assert inspect.signature(decor).parameters.keys() == inspect.signature(plain).parameters.keys()
    layer = decor(*args)
    inside = repr(plain(*args)).removeprefix(plain.__name__)[:-1]
    assert repr(layer) == f"{decor.__name__}{inside}, R={tuple(layer.R.shape)})"


def test_conv_transpose_takes_output_size():
    layer, plain = (
        c(4, 6, 3, stride=2, padding=1) for c in (dnn.DecorConvTranspose2d, nn.ConvTranspose2d)
    )
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "R"})
    x = torch.randn(2, 4, 6, 6)
    for size in ([12, 12], [11, 12], (2, 6, 12, 11)):
        torch.testing.assert_close(layer(x, output_size=size), plain(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[20, 20])
    with pytest.raises(ValueError, match="zeros"):
        dnn.DecorConvTranspose2d(4, 6, 3, padding_mode="reflect")


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_copies_and_pickles_carry_no_samples(decor, args, shape):
    layer = decor(*args)
    update = dbp.DecorUpdate(layer, sample=1.0)
    random_R(layer)
    x = torch.randn(shape)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), saved):
        assert other._recorder is None
        assert other._recorder_key is None
        torch.testing.assert_close(other(x), y)
    assert len(pickle.dumps(layer)) < len(pickle.dumps(decor(*args))) + 200
    assert len(update._recorders[0][0].samples) == 1
    assert copy.deepcopy(layer).R is not layer.R


def model() -> nn.Sequential:
    return nn.Sequential(dnn.DecorConv2d(2, 3, 3), nn.Flatten(), dnn.DecorLinear(12, 4))


def plain_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def test_a_missing_R_is_the_identity():
    plain, net = plain_model(), model()
    x = torch.randn(5, 2, 4, 4)
    random_R(net[0])
    random_R(net[2])
    assert net.load_state_dict(plain.state_dict(), strict=True).missing_keys == []
    torch.testing.assert_close(net(x), plain(x))
    assert torch.equal(net[0].R, torch.eye(18))
    # On the meta device, with assign=True.
    with torch.device("meta"):
        net = model()
    net.load_state_dict(plain.state_dict(), strict=True, assign=True)
    torch.testing.assert_close(net(x), plain(x))


def test_a_partial_checkpoint_leaves_other_layers_alone():
    net = model()
    random_R(net[0])
    before = net[0].R.clone()
    head = {k: v for k, v in plain_model().state_dict().items() if k.startswith("2.")}
    report = net.load_state_dict(head, strict=False)
    assert torch.equal(net[0].R, before)
    assert "0.R" in report.missing_keys
    assert "2.R" not in report.missing_keys
    with pytest.raises(RuntimeError, match=r"Missing key.*0.weight"):
        net.load_state_dict(head)


def test_checkpoint_with_R():
    net, other = model(), model()
    random_R(net[0])
    other.load_state_dict(net.state_dict())
    assert torch.equal(other[0].R, net[0].R)
    assert other[0].R is not net[0].R
    state = net.state_dict()
    state["0.R"] = torch.eye(7)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.R"):
        other.load_state_dict(state)
    half = {k: v.half() for k, v in net.state_dict().items()}
    other.load_state_dict(half, assign=True)
    assert other[0].R.dtype == torch.float32
    assert other[0].weight.dtype == torch.float16


def test_reset():
    layer = dnn.DecorConv2d(2, 3, 3, groups=1)
    R, weight = layer.R, layer.weight.detach().clone()
    random_R(layer)
    layer.reset_decorrelation()
    assert layer.R is R
    assert torch.equal(R, torch.eye(18))
    assert torch.equal(layer.weight, weight)
    random_R(layer)
    layer.reset_parameters()
    assert torch.equal(layer.R, torch.eye(18))
    assert not torch.equal(layer.weight, weight)


def test_share_memory_and_requires_grad():
    layer = dnn.DecorLinear(3, 2).share_memory()
    assert layer.R.is_shared()
    assert not layer.requires_grad_(True).R.requires_grad


@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 4), (4, 3, 2, 2), (12,), (2, 5, 12)])
def test_decorrelate(shape):
    layer = dnn.Decorrelate(12, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x)
    random_R(layer)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 12), x.reshape(-1, 12) @ layer.R.T)
    y.sum().backward()
    torch.testing.assert_close(x.grad.reshape(-1, 12)[0], layer.R.sum(0))
    assert repr(layer) == "Decorrelate(12)"


def test_decorrelate_checks_its_arguments():
    for value in (0, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match="num_features"):
            dnn.Decorrelate(value)
    with pytest.raises(ValueError, match=r"12 features.*\(4, 5\)"):
        dnn.Decorrelate(12)(torch.randn(4, 5))
    layer = dnn.Decorrelate(4)
    random_R(layer)
    layer.load_state_dict({})
    assert torch.equal(layer.R, torch.eye(4))
    assert dnn.Decorrelate(4, device="meta", dtype=torch.float16).R.dtype == torch.float32


@pytest.mark.parametrize(("decor", "args", "shape"), LAYERS)
def test_autocast(decor, args, shape):
    layer = decor(*args)
    random_R(layer)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_channels_last_is_kept():
    layer = dnn.DecorConv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_compile_fullgraph_with_samples_and_dynamic_batch():
    torch._dynamo.reset()
    net = nn.Sequential(
        dnn.DecorConv2d(2, 3, 3, padding="same"),
        dnn.DecorConvTranspose2d(3, 2, 2),
        nn.Flatten(),
        dnn.Decorrelate(32),
        dnn.DecorLinear(32, 4),
    )
    update = dbp.DecorUpdate(net, sample=0.5)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for count in (4, 6, 8):  # the second traces a graph for any size, the third uses it
        x = torch.randn(count, 2, 3, 3)
        out = compiled(x)
        out.sum().backward()
        torch.testing.assert_close(out, net(x))
        for recorder in update._recorders[0]:
            assert [len(s) for s in recorder.samples] == [count // 2] * 2
            assert torch.equal(recorder.samples[0], recorder.samples[1])
        update.discard()
    net.eval()
    compiled(x)
    assert not update._recorders[0][0].samples


def test_compile_fullgraph_without_an_optimiser():
    torch._dynamo.reset()
    layer = dnn.DecorConv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 4, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_func_transforms():
    layer = dnn.DecorLinear(3, 2)
    random_R(layer)
    x = torch.randn(5, 3)
    parameters = dict(layer.named_parameters())

    def loss(p, v):
        return torch.func.functional_call(layer, p, (v,)).square().sum()

    update = dbp.DecorUpdate(layer, sample=1.0)
    gradient = torch.func.grad(loss)(parameters, x)["weight"]
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)
    first, second = update._recorders[0][0].samples
    assert torch.equal(first, second)
    assert type(first) is torch.Tensor
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    with pytest.raises(RuntimeError, match="vmap"):
        per_sample(parameters, x)
    update.detach()
    torch.testing.assert_close(per_sample(parameters, x)["weight"].sum(0), gradient)


def test_module_used_as_its_torch_class_elsewhere():
    """Code that asks for a torch layer's class and attributes finds them."""
    layer = dnn.DecorConv2d(2, 4, 3)
    nn.init.kaiming_normal_(layer.weight)
    assert isinstance(layer, nn.Conv2d)
    assert layer.in_channels == 2
    with torch.no_grad():
        out = F.conv2d(torch.ones(1, 2, 3, 3), layer.weight, layer.bias)
    torch.testing.assert_close(layer(torch.ones(1, 2, 3, 3)), out)
