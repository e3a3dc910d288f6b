"""The attached model is an ordinary one: its parameters, copies, dtypes and compiled forms."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from attach_forms import (
    LAYERS,
    OPTIMIZERS,
    OPTIONS,
    A_of,
    OptimizerForm,
    batches,
    make,
    pending,
    train,
    trained,
)

import dbp_kernels as dbp


def test_the_model_is_a_plain_one():
    form = trained()
    plain = make()
    assert form.model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(form.model.state_dict())
    x, _ = next(batches(1, seed=5))
    torch.testing.assert_close(plain.eval()(x), form.model.eval()(x), rtol=0, atol=0)
    assert all(type(a) is type(b) for a, b in zip(plain.modules(), form.model.modules()))


def test_the_parameters_and_their_memory_stay_the_same():
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS)
    before = {n: (id(p), p.data_ptr()) for n, p in form.model.named_parameters()}
    train(form, 3)
    assert before == {n: (id(p), p.data_ptr()) for n, p in form.model.named_parameters()}
    for name in LAYERS:
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))


def test_backward_through_a_pass_from_before_the_step_raises():
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS)
    x, y = next(batches(1))
    loss = F.cross_entropy(form.model(x), y)
    loss.backward(retain_graph=True)
    form.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_model_feeds_nobody(copied):
    form = trained()
    other = copied(form.model)
    x, _ = next(batches(1))
    torch.testing.assert_close(other(x), make_like(form.model)(x), rtol=0, atol=0)
    assert pending(form) == 0
    form.model(x)
    assert pending(form) == len(LAYERS)


def make_like(model):
    plain = make()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_handle_need_not_be_kept():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dbp.attach(model, optimizer, **OPTIONS)
    gc.collect()
    for x, y in batches(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    (feed,) = model.head._forward_hooks.values()
    assert not torch.equal(feed.site.R, torch.eye(7, dtype=torch.float64))


def test_averaged_models():
    form = trained()
    averaged = torch.optim.swa_utils.AveragedModel(form.model)
    train(form, 1)
    averaged.update_parameters(form.model)
    averaged.eval()(next(batches(1))[0])
    assert pending(form) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_under_torch_compile(when):
    torch.compiler.reset()
    eager, form = (OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS) for _ in range(2))
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    if when == "before":
        form = OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS)
        form.decor.detach()
        compiled = torch.compile(form.model, backend=counter, fullgraph=True)
        form.decor = dbp.attach(form.model, form.optimizer, **OPTIONS)
    else:
        compiled = torch.compile(form.model, backend=counter, fullgraph=True)
    plain = form.model
    form.model = compiled
    losses = train(form, 6)
    form.model = plain
    torch.testing.assert_close(losses, train(eager, 6), rtol=1e-9, atol=1e-9)
    for name in LAYERS:
        for ours, theirs in zip(form.of(name), eager.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_samples_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, form = (OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS) for _ in range(2))
    inner = form.model.forward
    train(plain, 3)
    for x, y in batches(3):
        out = checkpoint(inner, x.requires_grad_(), use_reentrant=reentrant)
        F.cross_entropy(out, y).backward()
        form.step()
    for name in LAYERS:
        assert all(map(torch.equal, plain.of(name), form.of(name)))


def test_autocast_and_half_precision_weights_keep_R_in_float32():
    model = make().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    for x, y in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
    assert decor.R("head").dtype == torch.float32
    assert model.head.weight.dtype == torch.float32
    half = make().bfloat16()
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    decor = dbp.attach(half, optimizer, **OPTIONS)
    for x, y in batches(3):
        F.cross_entropy(half(x.bfloat16()).float(), y).backward()
        optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert decor.R("head").dtype == torch.float32
    assert half.head.weight.dtype == torch.bfloat16


def test_moving_the_model_takes_R_along():
    form = trained()
    form.model.float()
    form.model.double()
    with pytest.warns(UserWarning, match="were changed outside"):  # by rounding to float32
        train(form, 1)
    assert form.decor.R("head").dtype == torch.float64


@pytest.mark.parametrize("optimizer", ["adamw", "adamw, fused"])
def test_another_memory_layout_changes_nothing(optimizer):
    """Fused optimisers take weights, gradients and states to lie in memory alike."""
    forms = [OptimizerForm(OPTIMIZERS[optimizer], **OPTIONS) for _ in range(2)]
    forms[1].model.to(memory_format=torch.channels_last)
    for form in forms:
        train(form, 3)
    for name in LAYERS:
        for ours, theirs in zip(*(form.of(name) for form in forms)):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_moving_the_model_takes_R_along_to_gradients_before_the_step():
    """On another device than dL/dA it could not be multiplied by."""
    form = OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS)
    form.model.float()
    weight = form.model.head.weight
    weight.grad = torch.ones_like(weight)
    form.decor.transform_gradients()
    assert form.decor.R("head").dtype == torch.float32
