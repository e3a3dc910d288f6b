"""Checkpoints of an optimiser with attach: resumed bit for bit, taken over, or plain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attach_forms import LAYERS, OPTIMIZERS, OPTIONS, OptimizerForm, batches, make, train, trained

import dbp_kernels as dbp


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_resumes_bit_for_bit(optimizer, tmp_path):
    options = {"sampling": "random", "update_every": 2}
    whole = trained(6, optimizer, **options)
    first = trained(3, optimizer, **options)
    torch.save((first.model.state_dict(), first.optimizer.state_dict()), tmp_path / "saved")
    second = OptimizerForm(OPTIMIZERS[optimizer], **{**OPTIONS, **options})
    model, state = torch.load(tmp_path / "saved", weights_only=True)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(state)
    data = list(batches(6))
    for form, part in ((second, data[3:]),):
        for x, y in part:
            F.cross_entropy(form.model(x), y).backward()
            form.step()
    for name in LAYERS:
        assert all(map(torch.equal, whole.of(name), second.of(name)))
    assert whole.decor.losses().keys() == second.decor.losses().keys()
    for name, loss in whole.decor.losses().items():
        assert torch.equal(loss, second.decor.losses()[name])


def test_a_checkpoint_loaded_before_attach_is_taken_over():
    first = trained(3)
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model.load_state_dict(first.model.state_dict())
    optimizer.load_state_dict(first.optimizer.state_dict())
    decor = dbp.attach(model, optimizer, **OPTIONS)
    for name in LAYERS:
        assert torch.equal(decor.R(name), first.decor.R(name))
        assert torch.equal(decor.W(name), first.decor.W(name))


def test_a_plain_checkpoint_starts_at_the_identity_and_says_so():
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plain = optimizer.state_dict()
    form = trained(2)
    with pytest.warns(UserWarning, match="no R of 'first', 'grouped', 'depthwise' and 4 more"):
        form.optimizer.load_state_dict(plain)
    assert torch.equal(form.decor.R("first"), torch.eye(27, dtype=torch.float64))
    assert torch.equal(form.decor.W("first"), form.model.first.weight)


def test_a_state_from_before_the_first_step_has_no_losses():
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS)
    model, state = copy.deepcopy((form.model.state_dict(), form.optimizer.state_dict()))
    train(form, 2)
    assert form.decor.losses()
    form.model.load_state_dict(model)
    form.optimizer.load_state_dict(state)
    assert form.decor.losses() == form.decor.skipped() == {}


def test_every_tensor_of_a_state_is_its_own():
    """torch.distributed.checkpoint loads into those that are there."""
    for form in (OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS), trained(2)):
        state = form.optimizer.state_dict()
        layers = state["param_groups"][0]["dbp"]["layers"].values()
        tensors = [tensor for layer in layers for tensor in layer.values()]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.filterwarnings("ignore:the loaded optimiser state has")
@pytest.mark.parametrize(
    "options",
    [{"update_every": 3}, {"budget": 0.3, "costs": "planned"}],
    ids=["turns", "budget"],
)
@pytest.mark.parametrize("more", [False, True], ids=["fewer", "more"])
def test_a_checkpoint_of_other_layers_goes_on(options, more):
    """Whose turns and schedule are not those of ours."""
    own, theirs = ({}, {"exclude": "head"}) if more else ({"exclude": "head"}, {})
    first = trained(7, **theirs, **options)
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS, **own, **options)
    form.model.load_state_dict(first.model.state_dict())
    form.optimizer.load_state_dict(first.optimizer.state_dict())
    for name in first.decor.decorrelated().keys() & form.decor.decorrelated().keys():
        assert torch.equal(form.decor.R(name), first.decor.R(name))
    train(form, 4)
    assert form.decor._engine._steps == 11
    assert form.decor.losses().keys() == form.decor.decorrelated().keys()
