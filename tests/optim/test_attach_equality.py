"""The optimiser form against the layer form, in float64: the same algorithm."""

import pytest
import torch
from attach_forms import LAYERS, OPTIMIZERS, OPTIONS, LayerForm, OptimizerForm, assert_equal, train

from dbp_kernels.optim import stagger


def compare(make_optimizer, steps=20, micro=1, **options):
    forms = LayerForm(make_optimizer, **options), OptimizerForm(make_optimizer, **options)
    losses = [train(form, steps, micro) for form in forms]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert_equal(*forms)
    moved = forms[1].decor.R("first") - torch.eye(27, dtype=torch.float64)
    assert moved.abs().max() > 1e-3
    return forms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_layer_form(name):
    compare(OPTIMIZERS[name], **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3, "rule": "normalized", "kappa": 0.1, "sample": 4},
        {"lr": 1e-2, "demean": True, "kappa": 1.0, "sample": 1.0},
        {"lr": 1e-2, "update_every": 3, "kappa": 0.0, "stagger": False},
        {"lr": 1e-2, "update_every": 3, "stagger": True},
        {"lr": 1e-2, "sampling": "random", "sample": 0.5},
        {"lr": 1e-2, "budget": 0.2, "costs": "planned", "sample": 0.5},
    ],
    ids=lambda o: ", ".join(o),
)
def test_equals_the_layer_form_with_options(options):
    compare(OPTIMIZERS["adam"], **options)


def test_accumulation_over_micro_steps_equals_the_layer_form():
    compare(OPTIMIZERS["adamw"], micro=3, **OPTIONS)


def test_layers_take_turns():
    """After the first step each is due once in every 3 steps, and about as many at each."""
    form = OptimizerForm(OPTIMIZERS["sgd"], update_every=3, **OPTIONS)
    moved = []
    for step in range(7):
        before = {name: form.decor.R(name).clone() for name in LAYERS}
        train(form, 1, seed=step)
        moved.append({n for n in LAYERS if not torch.equal(form.decor.R(n), before[n])})
    assert moved[0] == set(LAYERS)
    assert moved[1] | moved[2] | moved[3] == set(LAYERS)
    assert moved[1:4] == moved[4:7]
    assert all(2 <= len(turn) <= 3 for turn in moved[1:])


def test_turns_are_shared_out_by_cost():
    assert stagger.phases([5, 1, 1, 3], [2, 2, 2, 2]) == [0, 1, 1, 1]
    assert stagger.phases([1, 1, 9, 1], [1, 2, 1, 2]) == [0, 0, 0, 1]
    # a layer that is never due again takes no memory for all the steps until then
    assert stagger.phases([1, 2], [10**15, 10**15]) == [1, 0]
