"""Gradients beside attach: of A or of W, and samples that go with a gradient that is dropped."""

import pytest
import torch
import torch.nn.functional as F
from attach_forms import (
    LAYERS,
    OPTIMIZERS,
    OPTIONS,
    LayerForm,
    OptimizerForm,
    assert_equal,
    batches,
    pending,
    trained,
)
from torch import nn


def test_gradients_are_those_of_A_before_and_after_the_step():
    form = trained()
    x, y = next(batches(1, seed=7))
    F.cross_entropy(form.model(x), y).backward()
    weight = form.model.tokens.weight
    gradient = weight.grad
    kept = gradient.clone()
    form.optimizer.step()
    assert weight.grad is gradient
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_samples_of_a_skipped_step_go_with_its_gradient(set_to_none):
    """Whether zero_grad comes after the step or between forward and backward."""
    form, expected = trained(3), trained(3)
    first, second = batches(2, seed=8)
    for x, y in (first, second):
        loss = F.cross_entropy(form.model(x), y)
        form.optimizer.zero_grad(set_to_none)
        loss.backward()
        # the first step is skipped
    assert pending(form) == len(LAYERS)
    form.optimizer.step()
    F.cross_entropy(expected.model(second[0]), second[1]).backward()
    expected.optimizer.step()
    for name in LAYERS:
        assert torch.equal(form.decor.R(name), expected.decor.R(name))


def test_zero_grad_between_micro_steps_keeps_what_is_still_to_go_backward():
    form = trained(1)
    (x1, y1), (x2, y2), (x3, y3) = batches(3, seed=8)
    F.cross_entropy(form.model(x1), y1).backward()
    late = F.cross_entropy(form.model(x2), y2) + F.cross_entropy(form.model(x3), y3)
    assert pending(form) == 3 * len(LAYERS)
    form.optimizer.zero_grad()
    assert pending(form) == 2 * len(LAYERS)
    recorder = form.decor._engine._recorders[0][0]
    assert torch.equal(recorder.samples[0], x2[:3])
    late.backward()
    form.optimizer.step()
    assert pending(form) == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_transformed_gradients_are_those_of_W_and_are_stepped_with(set_to_none):
    """Against the layer form, whose gradients they are, clipped alike."""
    make_optimizer = OPTIMIZERS["sgd"]
    layers, attached = (f(make_optimizer, **OPTIONS) for f in (LayerForm, OptimizerForm))
    for x, y in batches(4):
        for form in (layers, attached):
            F.cross_entropy(form.model(x), y).backward()
        attached.decor.transform_gradients()
        attached.decor.transform_gradients()  # once is enough, twice does no harm
        for ours, theirs in zip(attached.model.parameters(), layers.model.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        for form in (layers, attached):
            nn.utils.clip_grad_norm_(form.model.parameters(), 0.1)
            form.optimizer.step()
            if form is layers:
                form.decor.step()
            form.optimizer.zero_grad(set_to_none)
    assert_equal(layers, attached)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_models_zero_grad_ends_transformed_gradients(set_to_none):
    """The next ones are dL/dA again, even in the same memory."""
    form, expected = trained(2), trained(2)
    for x, y in batches(2, seed=9):
        for one in (form, expected):
            F.cross_entropy(one.model(x), y).backward()
        form.decor.transform_gradients()
        for one in (form, expected):
            one.optimizer.step()
        form.model.zero_grad(set_to_none)
        expected.optimizer.zero_grad()
    assert_equal(form, expected)


def test_a_backward_pass_onto_transformed_gradients_raises():
    form = trained(2)
    (x, y), other = batches(2, seed=9)
    F.cross_entropy(form.model(x), y).backward()
    form.decor.transform_gradients()
    before = form.model.tokens.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"backward\(\) after transform_gradients\(\)"):
        F.cross_entropy(form.model(other[0]), other[1]).backward()
    assert torch.equal(form.model.tokens.weight.grad, before)
    form.optimizer.step()
    form.optimizer.zero_grad()
    F.cross_entropy(form.model(x), y).backward()
    form.optimizer.step()
