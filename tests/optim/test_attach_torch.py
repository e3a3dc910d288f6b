"""``dbp.attach`` beside torch's own ways: functional calls, Muon, learning rates as tensors, unfreezing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_training import (
    OPTIONS,
    assert_equal,
    attached,
    batches,
    everything,
    make_model,
    train,
    trained,
)
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import dbp_kernels as dbp

# Functional calls.


def with_functional_calls(parameters, transformed):
    """The state after three steps whose passes are functional calls with what ``parameters`` gives."""
    model, optimizer, decor = attached()
    for x, y in batches(0, 3):
        named = parameters(model)
        if transformed:
            loss = lambda p, x=x, y=y: F.cross_entropy(functional_call(model, p, (x,)), y)  # noqa: E731
            for name, gradient in grad(loss)(named).items():
                model.get_parameter(name).grad = gradient
        else:
            F.cross_entropy(functional_call(model, named, (x,)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, decor)


@pytest.mark.parametrize("transformed", [False, True])
def test_functional_calls_with_the_own_weights_are_calls(transformed):
    model, _, decor = trained(3)
    own = lambda model: dict(model.named_parameters())  # noqa: E731
    assert_equal(with_functional_calls(own, transformed), everything(model, decor))


def test_functional_calls_with_the_own_weights_detached_are_calls():
    model, _, decor = trained(3)
    detached = lambda model: {n: p.detach() for n, p in model.named_parameters()}  # noqa: E731
    assert_equal(with_functional_calls(detached, True), everything(model, decor))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_functional_call_with_other_weights_gives_no_samples(compiled):
    """A teacher's or an ensemble's, whose layers see other inputs."""
    expected = everything(*trained(3)[::2])
    model, optimizer, decor = attached()
    others = [make_model() for _ in range(2)]
    for other in others:
        nn.utils.vector_to_parameters(torch.randn(8 * 28 + 129 * 5), other.parameters())
    stacked, _ = stack_module_state(others)
    call = lambda p, x: functional_call(model, p, (x,))  # noqa: E731
    called = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
    for step in range(3):
        ((x, _),) = batches(step, step + 1)
        called(dict(others[0].named_parameters()), x)
        if not compiled:
            vmap(call, (0, None), randomness="same")(stacked, x)
        train(model, optimizer, step, step + 1)
    assert_equal(everything(model, decor), expected)


# Muon.


def test_muon_steps_on_W():
    """Against the layer form; Muon rounds to bfloat16 within, so equal to that."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def optimizers(model):
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        return torch.optim.Muon(weights, lr=0.05), torch.optim.SGD(biases, lr=0.05)

    layers = dbp.decorrelate_model(make())
    model = make()
    theirs, ours = optimizers(layers), optimizers(model)
    update = dbp.DecorUpdate(layers, lr=1e-2, sample=0.5)
    decor = dbp.attach(model, ours, lr=1e-2, sample=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = 1 + torch.randn(8, 6, generator=generator, dtype=torch.float64)
        for network, several in ((layers, theirs), (model, ours)):
            network(x).square().sum().backward()
            for optimizer in several:
                optimizer.step()
            if network is layers:
                update.step()
            for optimizer in several:
                optimizer.zero_grad()
    for name in ("0", "2"):
        layer = layers.get_submodule(name)
        moved = (decor.W(name) - make().get_submodule(name).weight).abs().max()
        assert moved > 0.1
        bound = 0.05 * 6 * 2**-7  # the steps' sizes, to bfloat16's precision
        torch.testing.assert_close(decor.W(name), layer.weight, rtol=0, atol=bound)
        torch.testing.assert_close(decor.R(name), layer.R, rtol=0, atol=bound)


# Compiled steps.


def test_a_compiled_step_is_a_step():
    """The optimiser's own part is one graph, and nothing of ours is traced."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    model, optimizer, decor = trained(4)
    expected = everything(model, decor)
    model, optimizer, decor = attached()
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for x, y in batches(0, 4):
        F.cross_entropy(model(x), y).backward()
        step()
        optimizer.zero_grad()
    torch.testing.assert_close(everything(model, decor), expected, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


# Several optimisers.


def with_two_optimizers(order, *, idle=False):
    """The handle after four steps by two optimisers, of the layers 0 and 3, stepping in an order."""
    model = make_model()
    optimizers = [torch.optim.SGD(model[n].parameters(), lr=0.05) for n in (0, 3)]
    decor = dbp.attach(model, optimizers, lr=1e-2, sample=0.5)
    for x, y in batches(0, 4):
        F.cross_entropy(model(x), y).backward()
        for n in order:
            optimizers[n].step()
        if not idle:
            model.zero_grad()
        for n in order:
            optimizers[n].zero_grad()
    return everything(model, decor), decor


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_in_which_optimizers_step_does_not_matter(order):
    model, _, decor = trained(4, "sgd", update_every=1, sampling="first")
    assert_equal(with_two_optimizers(order)[0], everything(model, decor))


@pytest.mark.parametrize("stepping", [0, 1])
def test_an_optimizer_that_rests_is_not_waited_for(stepping):
    """Whether its gradients are dropped, or pile up."""
    for idle in (False, True):
        state, decor = with_two_optimizers((stepping,), idle=idle)
        name = "03"[stepping]
        assert not torch.equal(state[f"R {name}"], torch.eye(len(state[f"R {name}"])))
        assert decor._engine._steps >= 3


# Learning rates as tensors.


def test_the_optimizers_learning_rate_may_be_a_tensor():
    states = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = make_model().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for x, y in batches(0, 3):
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        states.append(everything(model, decor))
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


def test_the_learning_rate_of_R_may_be_a_tensor():
    model, _, decor = trained(3)
    other, _, other_decor = trained(3, lr=torch.tensor(1e-2, dtype=torch.float64))
    assert_equal(everything(other, other_decor), everything(model, decor))
    layers = dbp.decorrelate_model(make_model())
    assert dbp.DecorUpdate(layers, lr=torch.tensor(0.5)).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "lr", [torch.tensor(-1.0), torch.tensor([1.0]), torch.tensor(float("nan"))]
)
def test_a_bad_tensor_is_no_learning_rate(lr):
    with pytest.raises(ValueError, match=r"lr=tensor.*: expected a finite number from 0 to"):
        attached(lr=lr)


# Weights that come later.


def test_unfrozen_layers_join():
    """What trainers of pretrained networks do: the head first, later all the rest."""
    model = make_model()
    optimizer = torch.optim.AdamW(model[3].parameters(), lr=1e-2)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    assert decor.left_alone() == {"0": "its weight is not in the optimiser"}
    train(model, optimizer, 0, 2)
    head = everything(model, decor)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-3})
    assert_equal(everything(model, decor) | head, everything(model, decor))
    assert decor.left_alone() == {}
    assert list(decor.decorrelated()) == ["3", "0"]
    assert torch.equal(decor.W("0"), model[0].weight)
    train(model, optimizer, 2, 4)
    for name in ("0", "3"):
        site = decor._site(name)
        assert not torch.equal(site.R, torch.eye(len(site.R)))
        assert torch.equal(model.get_submodule(name).weight, site.condensed())

    again = make_model()
    resumed = torch.optim.AdamW(again[3].parameters(), lr=1e-2)
    resumed_decor = dbp.attach(again, resumed, **OPTIONS)
    resumed.add_param_group({"params": again[0].parameters(), "lr": 1e-3})
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (again, resumed)):
        train(*pair, 4, 6)
    assert_equal(everything(again, resumed_decor), everything(model, decor))


def test_joining_keeps_to_what_attach_was_told():
    model = make_model()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, exclude="0")
    optimizer.add_param_group({"params": model[0].parameters()})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert decor.left_alone() == {"0": "among exclude"}
    assert list(decor.decorrelated()) == ["3"]
    train(model, optimizer, 0, 2)


def test_nothing_joins_after_detach():
    model = make_model()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer)
    decor.detach()
    optimizer.add_param_group({"params": model[0].parameters()})
    assert list(decor.decorrelated()) == ["3"]
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("gradients", [True, False])
def test_samples_are_taken_where_compiled_code_breaks_off_behind_the_layer(gradients):
    """The piece that takes them has no gradients of its own, and is run without."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, sample=1.0)
    for layer in (model[0], model[2]):
        layer.register_forward_hook(torch.compiler.disable(lambda *_: None))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        compiled(torch.randn(4, 6))
    recorders = [recorder for _, _, recorder in decor._engine._places()]
    assert [len(recorder.samples) for recorder in recorders] == [int(gradients)] * 2
