"""A = W R where it is rounded to half precision: in TF32 on CUDA, for which a CPU stands in."""

import copy

import pytest
import torch
from helpers import Products, random
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import precision
from dbp_kernels.optim.swap import in_own_precision
from dbp_kernels.products import rows_times

LAYERS = {
    "linear": (lambda: dnn.DecorLinear(6, 4), (3, 6)),
    "conv": (lambda: dnn.DecorConv1d(4, 6, 3), (2, 4, 5)),
    "groups": (lambda: dnn.DecorConv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: dnn.DecorConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transposed groups": (lambda: dnn.DecorConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def layer_of(make, dtype=torch.float32) -> nn.Module:
    layer = make()
    with torch.no_grad():
        layer.weight.copy_(random(layer.weight.shape, torch.float32))
        layer.R.add_(0.1 * random(layer.R.shape, torch.float32, 1))
    return layer.to(dtype)


@pytest.fixture
def as_cuda(monkeypatch):
    """What asks whether it is on CUDA is told so; products of float32 are set to full precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    monkeypatch.setattr(precision, "on_cuda", lambda x: True)
    yield
    matmul.fp32_precision = before


@pytest.fixture
def formed(monkeypatch) -> list[str]:
    """The precision of float32 on CUDA at every torch.matmul: recorded by nothing that dispatch,
    and so the layers, could notice."""
    formed, real = [], torch.matmul

    def matmul(X, Y):
        formed.append(torch.backends.cuda.matmul.fp32_precision)
        return real(X, Y)

    monkeypatch.setattr(torch, "matmul", matmul)
    return formed


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_tf32_under_autocast(dtype, make, shape, as_cuda, formed):
    layer, x = layer_of(make), random(shape, torch.float32)
    with autocast(dtype):
        layer(x)
    assert formed == ["tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@every_layer
def test_in_tf32_for_weights_in_half_precision(make, shape, as_cuda, formed):
    layer = layer_of(make, torch.bfloat16)
    layer(random(shape, torch.bfloat16))
    assert layer.R.dtype == torch.float32
    assert formed == ["tf32"]


@every_layer
def test_in_full_precision_where_nothing_is_rounded(make, shape, as_cuda, formed):
    layer, x = layer_of(make), random(shape, torch.float32)
    layer(x)
    with autocast(), torch.autocast("cpu", enabled=False):
        layer(x)
    layer.double()
    with autocast():
        layer._condense()  # autocast leaves float64 alone
    assert formed == []


@every_layer
def test_gradients_are_the_same_and_their_products_as_torch_is_set(
    make, shape, as_cuda, monkeypatch
):
    original, x, gradients = layer_of(make), random(shape, torch.float32), []
    for on_cuda in (True, False):
        monkeypatch.setattr(precision, "on_cuda", lambda x, answer=on_cuda: answer)
        layer = copy.deepcopy(original)
        layer.R.requires_grad_()
        with autocast():
            loss = layer(x).float().square().sum()
        with Products() as products:
            loss.backward()
        assert set(products.seen) == {"ieee"}
        gradients.append((layer.weight.grad, layer.R.grad))
    for found, expected in zip(*gradients):
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_second_derivatives():
    X, Y = random((3, 5)).requires_grad_(), random((5, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(rows_times._InTF32.apply, (X, Y))
    assert torch.autograd.gradcheck(rows_times._InTF32.apply, (X, Y))


@every_layer
def test_transforms_and_compilers_see_through(make, shape, as_cuda, formed):
    """They trace what no setting can be changed in: A as torch is set, and every derivative."""
    layer, x = layer_of(make, torch.bfloat16), random(shape, torch.bfloat16)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, x).float().square().sum()

    weight = layer.weight.detach()
    gradient = torch.func.grad(loss)(weight)
    (batched,) = torch.func.vmap(torch.func.grad(loss))(weight[None])
    _, tangent = torch.func.jvp(loss, (weight,), (weight,))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert formed == []
    output = layer(x)
    assert formed == ["tf32"]
    torch.testing.assert_close(compiled, output)
    (expected,) = torch.autograd.grad(output.float().square().sum(), layer.weight)
    for found in (gradient, batched):
        assert (found - expected).norm() < 2**-6 * expected.norm()  # bfloat16 has 8 bits
    torch.testing.assert_close(tangent, (expected * weight).float().sum(), rtol=2**-6, atol=0)


@every_layer
def test_compiled_under_autocast(make, shape, as_cuda, formed):
    layer, x = layer_of(make), random(shape, torch.float32)
    with autocast():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert formed == []
        torch.testing.assert_close(compiled, layer(x))


def test_a_fused_layer_is_never_rounded(as_cuda, formed):
    layer = layer_of(LAYERS["linear"][0])
    A = dbp.condensed_weight(layer.weight, layer.R)
    with autocast():
        fused = dbp.fuse_model(nn.Sequential(layer))
    assert formed == []
    assert torch.equal(fused[0].weight, A)


@every_layer
def test_a_cpu_does_without(make, shape, formed, monkeypatch):
    monkeypatch.setattr(rows_times, "tf32_products", None)
    layer, x = layer_of(make), random(shape, torch.float32)
    with autocast():
        layer(x).float().sum().backward()
    assert formed == []


def test_an_optimiser_without_layers_has_nothing_to_round():
    with in_own_precision([]):
        assert not precision.tf32()
