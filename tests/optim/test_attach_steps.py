"""The optimiser's own step beside attach: closures, errors, schedulers, scalers, several optimisers."""

import math

import pytest
import torch
import torch.nn.functional as F
from attach_forms import (
    LAYERS,
    OPTIMIZERS,
    OPTIONS,
    A_of,
    LayerForm,
    OptimizerForm,
    batches,
    closure_of,
    make,
    train,
    trained,
)

import dbp_kernels as dbp


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_closure_is_evaluated_on_A(name):
    plain, closure = (OptimizerForm(OPTIMIZERS[name], **OPTIONS) for _ in range(2))
    losses = train(plain, 5)
    seen = []
    for x, y in batches(5):
        seen.append(closure.optimizer.step(closure_of(closure, x, y)).detach())
    torch.testing.assert_close(torch.stack(seen), losses, rtol=0, atol=0)
    for layer in LAYERS:
        for ours, theirs in zip(closure.of(layer), plain.of(layer)):
            assert torch.equal(ours, theirs)


def test_lbfgs_evaluates_A_where_the_weights_are():
    """Against the layer form, which forms A in every pass."""
    make_optimizer = lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)  # noqa: E731
    layers, attached = (f(make_optimizer, **OPTIONS) for f in (LayerForm, OptimizerForm))
    for form in (layers, attached):
        for x, y in batches(3):
            form.optimizer.step(closure_of(form, x, y))
            if form is layers:
                form.decor.step()
    for name in LAYERS:
        for ours, theirs in zip(attached.of(name), layers.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Failing(torch.optim.SGD):
    fail = False

    def step(self, closure=None):
        result = super().step(closure)
        if self.fail:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("wrapped_before", [True, False])
def test_A_comes_back_when_a_step_raises(wrapped_before):
    """Also where somebody put a wrapper of step() aside before, and uses that."""
    model = make()
    optimizer = Failing(model.parameters(), lr=0.1)
    step = optimizer.step
    decor = dbp.attach(model, optimizer, **OPTIONS)
    x, y = next(batches(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = model.head.weight.detach().clone()
    R, steps = decor.R("head").clone(), decor._engine._steps
    W, gradient = decor.W("head").clone(), model.head.weight.grad.clone()
    optimizer.fail = True
    with pytest.raises(KeyboardInterrupt):
        (step if wrapped_before else optimizer.step)()
    if wrapped_before:
        model(x)
    assert torch.equal(decor.R("head"), R)
    assert decor._engine._steps == steps
    assert torch.equal(model.head.weight.grad, gradient)
    # the weights have made their step, as they would have without us, and A is theirs
    assert not torch.equal(decor.W("head"), W)
    assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.weight, decor._site("head").condensed())
    optimizer.fail = False
    optimizer.step()
    assert torch.equal(model.head.weight, decor._site("head").condensed())


@pytest.mark.parametrize("wrapped_before", [True, False])
def test_a_closure_that_raises_leaves_everything_usable(wrapped_before):
    def broken():
        raise ZeroDivisionError

    forms = []
    for interrupted in (False, True):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = optimizer.step
        decor = dbp.attach(model, optimizer, **OPTIONS)
        for n, (x, y) in enumerate(batches(3)):
            if interrupted and n == 1:
                with pytest.raises(ZeroDivisionError):
                    (step if wrapped_before else optimizer.step)(broken)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        forms.append((model.state_dict(), decor.W("head"), decor.R("head")))
    torch.testing.assert_close(*forms, rtol=0, atol=0)


def test_A_is_that_of_W_when_learning_R_raises(monkeypatch):
    form = trained(2)
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    before = [form.decor.R(name).clone() for name in LAYERS]

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr("dbp_kernels.optim.decor_update.local_updates", full)
    with pytest.raises(MemoryError):
        form.optimizer.step()
    assert all(map(torch.equal, before, map(form.decor.R, LAYERS)))
    for name in LAYERS:
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))


def test_super_step_of_a_subclass_counts_once():
    forms = [
        OptimizerForm(lambda p, c=c: c(p, lr=0.05), **OPTIONS) for c in (torch.optim.SGD, Failing)
    ]
    for form in forms:
        train(form, 4)
    for name in LAYERS:
        assert all(map(torch.equal, *(form.of(name) for form in forms)))


@pytest.mark.parametrize("first", ["scheduler", "attach"])
def test_with_a_learning_rate_scheduler(first):
    def run(order):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
        if order == "scheduler":
            schedule = scheduler()
        decor = dbp.attach(model, optimizer, **OPTIONS)
        if order == "attach":
            schedule = scheduler()
        for x, y in batches(4):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return decor

    decor = run(first)
    layers = LayerForm(lambda p: torch.optim.SGD(p, lr=0.1), **OPTIONS)
    schedules = [  # attach has R follow the weights' schedule
        torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
        for scheduled in (layers.optimizer, layers.decor)
    ]
    for x, y in batches(4):
        F.cross_entropy(layers.model(x), y).backward()
        layers.step()
        for schedule in schedules:
            schedule.step()
    for name in LAYERS:
        torch.testing.assert_close(decor.W(name), layers.of(name)[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(decor.R(name), layers.of(name)[2], rtol=1e-12, atol=1e-12)


def test_several_optimizers():
    def make_form(several):
        model = make()
        head = list(model.head.parameters())
        rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
        optimizers = (
            [torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(head, lr=0.1)]
            if several
            else [torch.optim.SGD(model.parameters(), lr=0.1)]
        )
        decor = dbp.attach(model, optimizers, **OPTIONS)
        for x, y in batches(4):
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        return decor

    one, two = make_form(False), make_form(True)
    for name in LAYERS:
        assert torch.equal(one.W(name), two.W(name))
        assert torch.equal(one.R(name), two.R(name))


def test_detach_leaves_a_plain_optimizer():
    form = trained()
    weight = form.model.head.weight.detach().clone()
    form.decor.detach()
    assert torch.equal(form.model.head.weight, weight)
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    R = form.decor.R("head").clone()
    form.step()
    assert not torch.equal(form.model.head.weight, weight)
    assert torch.equal(form.decor.R("head"), R)
    dbp.attach(form.model, form.optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw, fused"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_scaler_that_skips_changes_nothing(skip, optimizer):
    """A fused optimiser is called, and told on the device; the images are fine, the loss is not."""
    form = trained(2, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [t.detach().clone() for name in LAYERS for t in form.of(name)]
    x, y = next(batches(1))
    loss = F.cross_entropy(form.model(x), y) * (math.inf if skip else 1)
    scaler.scale(loss).backward()
    scaler.step(form.optimizer)
    scaler.update()
    after = [t for name in LAYERS for t in form.of(name)]
    assert all(map(torch.equal, before, after)) == skip
    assert not any(map(int, form.decor.skipped().values()))


def test_an_optimiser_without_a_layer_may_get_one():
    """Until then its steps end no round of the others."""
    model = make()
    first = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizers = torch.optim.SGD(first, lr=0.1), torch.optim.SGD([model.head.bias], lr=0.1)
    decor = dbp.attach(model, optimizers, **OPTIONS)
    for step, (x, y) in enumerate(batches(4)):
        if step == 2:
            assert "head" in decor.left_alone()
            optimizers[1].add_param_group({"params": [model.head.weight]})
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert decor._engine._steps == step + 1
    assert "head" in decor.losses()
