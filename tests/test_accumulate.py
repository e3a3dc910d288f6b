"""accumulate_gradients: the gradients of ordinary micro-steps, with A = W R formed once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dbp_kernels as dbp
from dbp_kernels import functional

F64 = torch.float64


class Net(nn.Module):
    """Every kind of layer, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.line = nn.Conv1d(2, 3, 3, stride=2)
        self.cube = nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(5, 5)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.tanh(self.grouped(self.conv(x)))))
        x = self.line(self.up(x).flatten(2))
        x = self.cube(x[:, None, :, :, None].expand(-1, -1, -1, -1, 2))
        x = F.adaptive_avg_pool1d(x.flatten(2), 5)
        return self.head(torch.tanh(self.head(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = dbp.decorrelate_model(Net().to(F64))
    for module in model.modules():
        if dbp.nn.is_decorrelated(module):
            module.R.add_(0.1 * torch.randn_like(module.R))
    return model


def batches(count: int = 3):
    torch.manual_seed(1)
    return [torch.randn(2, 3, 6, 6, dtype=F64) for _ in range(count)]


def train(model, xs):
    for x in xs:
        model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def counted(monkeypatch) -> list:
    """Appends to a list at every A that is formed."""
    formed = []
    for name in ("condensed_weight", "condensed_weight_transposed"):
        form = getattr(functional, name)

        def one(*arguments, form=form):
            formed.append(arguments)
            return form(*arguments)

        monkeypatch.setattr(functional, name, one)
    return formed


def test_gradients_outputs_and_samples_are_those_of_ordinary_steps(net):
    other = copy.deepcopy(net)
    decors = [dbp.DecorUpdate(model, lr=1e-2, sample=1.0) for model in (net, other)]
    expected = train(net, batches())
    with dbp.accumulate_gradients(other):
        assert torch.equal(other(batches()[0]), net(batches()[0]))
        train(other, batches())
        assert other.conv.weight.grad is None
        assert other.conv.bias.grad is not None
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-12)
    for decor in decors:
        decor.step()
    for module, twin in zip(net.modules(), other.modules()):
        if dbp.nn.is_decorrelated(module):
            torch.testing.assert_close(module.R, twin.R, rtol=1e-12, atol=1e-12)
    assert "_holder" not in vars(other.conv)


def test_each_weight_is_formed_once(net, monkeypatch):
    formed = counted(monkeypatch)
    with dbp.accumulate_gradients(net):
        train(net, batches(4))
    assert len(formed) == 6
    with dbp.accumulate_gradients(net.head):  # a single layer, anew
        net.head(torch.randn(2, 5, dtype=F64))
    assert len(formed) == 7


def test_gradients_of_before_are_added_to_and_frozen_weights_get_none(net):
    net.head.weight.requires_grad_(False)
    other = copy.deepcopy(net)
    expected = train(net, batches())
    train(other, batches()[:1])
    with dbp.accumulate_gradients(other):
        train(other, batches()[1:])
    assert other.head.weight.grad is None
    torch.testing.assert_close(other.conv.weight.grad, expected["conv.weight"])


def test_an_exception_loses_no_gradient(net):
    other = copy.deepcopy(net)
    expected = train(net, batches(1))

    def broken():
        with dbp.accumulate_gradients(other):
            train(other, batches(1))
            raise KeyError("loader")

    with pytest.raises(KeyError, match="loader"):
        broken()
    torch.testing.assert_close(other.conv.weight.grad, expected["conv.weight"])
    with dbp.accumulate_gradients(other):
        pass


def test_a_first_pass_without_gradients_does_not_take_them_from_the_others(net):
    other = copy.deepcopy(net)
    expected = train(net, batches())
    with dbp.accumulate_gradients(other):
        with torch.no_grad():
            other(batches()[0])
        with torch.inference_mode():
            other(batches()[0])
        train(other, batches())
    torch.testing.assert_close(other.conv.weight.grad, expected["conv.weight"])


@pytest.mark.parametrize("what", ["weight", "R"])
@pytest.mark.parametrize("again", [True, False])
def test_changed_weights_are_refused(net, what, again):
    def change():
        with dbp.accumulate_gradients(net):
            train(net, batches(1))
            with torch.no_grad():
                getattr(net.conv, what).mul_(2)
            if again:
                net(batches(1)[0])

    with pytest.raises(RuntimeError, match="changed within accumulate_gradients"):
        change()
    net(batches(1)[0])


def test_swapped_and_computed_weights_go_the_ordinary_way(net):
    other = copy.deepcopy(net)
    swapped = {k: v.detach().mul(2).requires_grad_() for k, v in net.named_parameters()}
    expected = torch.func.functional_call(net, swapped, batches(1)[0])
    with dbp.accumulate_gradients(net):
        found = torch.func.functional_call(net, swapped, batches(1)[0])
        found.sum().backward()
    assert torch.equal(found, expected)
    assert swapped["conv.weight"].grad is not None
    grad = torch.func.grad(lambda p: torch.func.functional_call(other, p, batches(1)[0]).sum())
    params = {k: v.detach() for k, v in swapped.items()}
    with dbp.accumulate_gradients(other):
        assert torch.equal(grad(params)["conv.weight"], swapped["conv.weight"].grad)
    nn.utils.parametrizations.weight_norm(other.head)
    expected = train(copy.deepcopy(other), batches(1))
    with dbp.accumulate_gradients(other):
        train(other, batches(1))
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_copies_and_fused_models_hold_nothing(net):
    x = batches(1)[0]
    expected = net(x)
    with dbp.accumulate_gradients(net):
        net(x)
        twin = copy.deepcopy(net)
        assert twin.conv._holder is None
    torch.testing.assert_close(dbp.fuse_model(twin)(x), expected)


def test_bad_arguments(net):
    with pytest.raises(TypeError, match="got list"), dbp.accumulate_gradients([net]):
        pass
    with dbp.accumulate_gradients(net):
        with pytest.raises(RuntimeError, match="already"), dbp.accumulate_gradients(net.conv):
            pass
        assert net.conv._holder is not None


def test_a_model_that_is_to_synchronise_is_refused(net, monkeypatch):
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module, wrapped.require_backward_grad_sync = net, True
    with pytest.raises(RuntimeError, match="within no_sync"), dbp.accumulate_gradients(wrapped):
        pass
    wrapped.require_backward_grad_sync = False
    with dbp.accumulate_gradients(wrapped):
        train(net, batches(1))
    assert net.conv.weight.grad is not None


def test_under_compile_all_is_as_without(net):
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected = train(copy.deepcopy(net), batches())
    with dbp.accumulate_gradients(net):
        train(compiled, batches())
    torch.testing.assert_close(net.conv.weight.grad, expected["conv.weight"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(net, use_reentrant):
    expected = train(copy.deepcopy(net), batches())
    with dbp.accumulate_gradients(net):
        for x in batches():
            y = checkpoint(net, x.requires_grad_(), use_reentrant=use_reentrant)
            y.square().sum().backward()
    torch.testing.assert_close(net.conv.weight.grad, expected["conv.weight"])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, dbp.DecorUpdate])
def test_a_step_within_the_block_is_refused_before_it_does_anything(net, optimizer):
    expected = train(copy.deepcopy(net), batches(1))
    before = copy.deepcopy(net.state_dict())
    step = optimizer(net if optimizer is dbp.DecorUpdate else net.parameters(), lr=0.1).step
    stranger = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def misuse():
        with dbp.accumulate_gradients(net):
            train(net, batches(1))
            stranger.step()
            step()

    with pytest.raises(RuntimeError, match=f"{optimizer.__name__}.step.. within"):
        misuse()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(net.conv.weight.grad, expected["conv.weight"])
    step()


def test_backward_after_the_block_is_refused(net):
    with dbp.accumulate_gradients(net):
        loss = net(batches(1)[0]).sum()
    with pytest.raises(RuntimeError, match="expected it within the block"):
        loss.backward()


@pytest.mark.parametrize("first", [True, False])
def test_freezing_within_the_block_is_heeded(net, first):
    other = copy.deepcopy(net)

    def steps(model):
        for learns, x in zip((first, not first), batches(2)):
            model.conv.weight.requires_grad_(learns)
            model(x).square().sum().backward()
        return model.conv.weight

    expected = steps(net).grad
    with dbp.accumulate_gradients(other):
        weight = steps(other)
    torch.testing.assert_close(weight.grad, expected)
    assert weight.requires_grad == (not first)


def test_a_parametrisation_is_asked_as_often_as_ever():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(dbp.nn.DecorLinear(6, 6))
    other, x = copy.deepcopy(layer), torch.randn(3, 6)
    with dbp.accumulate_gradients(other):
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other(x), layer(x))


def test_an_exception_goes_on_and_spoils_no_other_layers_gradients(net):
    expected = train(copy.deepcopy(net), batches(1))

    def broken():
        with dbp.accumulate_gradients(net):
            train(net, batches(1))
            with torch.no_grad():
                net.head.weight.mul_(2)
            raise KeyError("loader")

    with pytest.raises(KeyError, match="loader"):
        broken()
    torch.testing.assert_close(net.conv.weight.grad, expected["conv.weight"])
