"""Every kind of layer that attach knows, by the definition, and kinds that are registered."""

import pytest
import torch
from torch import nn

import dbp_kernels as dbp


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (5, 4, 7)),
        (nn.ConvTranspose3d(4, 2, 2, stride=2), (5, 4, 3, 3, 3)),
        (nn.Conv3d(4, 6, (1, 3, 2), groups=2, padding=1), (5, 4, 3, 4, 3)),
        (nn.Conv1d(4, 6, 3, padding_mode="circular", padding=1), (5, 4, 7)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_one_step_of_every_convolution_is_the_definition(layer, shape):
    """W and R as the paper has them: the function of W R, gradients of W, R's own rule."""
    torch.manual_seed(0)
    layer = layer.double()
    W0 = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    decor = dbp.attach(layer, optimizer, lr=1e-2, sample=1.0)
    name = type(layer).__name__
    x = 1 + torch.randn(shape, dtype=torch.float64)
    for _ in range(2):  # the second with an R that is not the identity
        W, R = decor.W(name).clone().requires_grad_(), decor.R(name).clone()
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            groups, D = layer.groups, R.shape[-1]
            A = (R.reshape(groups, D, D).mT @ W.reshape(groups, D, -1)).reshape(W.shape)
        else:
            D, groups = R.shape[-1], layer.groups
            A = (W.reshape(groups, -1, D) @ R.reshape(groups, D, D)).reshape(W.shape)
        expected = torch.func.functional_call(layer, {"weight": A, "bias": layer.bias}, (x,))
        out = layer(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        expected.square().sum().backward()
        layer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(decor.W(name), W - 0.1 * W.grad, rtol=1e-10, atol=1e-10)
        site = decor._site(name)
        R_new, _ = dbp.decor_update(x, R, **site.patches.window, lr=1e-2)
        torch.testing.assert_close(decor.R(name), R_new, rtol=1e-12, atol=1e-12)
        optimizer.zero_grad()
    assert not torch.equal(W0, decor.W(name))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x, memory=None):
        return self.attention(x, *[x if memory is None else memory] * 2)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_whose_query_is_key_and_value(batch_first):
    torch.manual_seed(0)
    model = Attention(batch_first).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5)
    assert list(decor.decorrelated()) == ["attention"]
    assert "without calling it" in decor.left_alone()["attention.out_proj"]
    x = 1 + torch.randn(4, 3, 6, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    sampled = x[:2] if batch_first else x.transpose(0, 1)[:2]
    expected, _ = dbp.decor_update(sampled, torch.eye(6, dtype=torch.float64), (), lr=1e-2)
    torch.testing.assert_close(decor.R("attention"), expected, rtol=1e-12, atol=1e-12)
    R = decor.R("attention").clone()
    model(x, x + 1).sum().backward()
    optimizer.step()
    assert torch.equal(decor.R("attention"), R)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

    def forward(self, x):
        return x @ self.kernel


def test_registering_a_kind():
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is no kind that"):
        dbp.attach(model, optimizer)
    dbp.register(Scaled, lambda m: dbp.Patches(6, weight="kernel", transposed=True))
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=1.0)
    x = 1 + torch.randn(5, 6, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    A = decor.R("Scaled").T @ decor.W("Scaled")
    torch.testing.assert_close(model.kernel, A, rtol=1e-12, atol=1e-12)
    for bad in (3, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="kind="):
            dbp.register(bad, lambda m: dbp.Patches(1))
    with pytest.raises(TypeError, match="describe=3"):
        dbp.register(Scaled, 3)
