"""What others do with an attached optimiser's state: torch.distributed.checkpoint, copies, files."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_training import (
    OPTIMIZERS,
    assert_equal,
    assert_learnt,
    attached,
    everything,
    make_model,
    train,
    trained,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

import dbp_kernels as dbp


def progress(decor):
    """What of the engine's moves from step to step."""
    engine = decor._engine
    return engine._steps, engine._phases, engine._generator.get_state().tolist()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("steps", [0, 3])
def test_asking_for_the_state_moves_nothing(optimizer, steps):
    """torch makes an optimiser's state by a step at lr 0 with gradients of zero, where it has none."""
    model, optimizer, decor = trained(steps, optimizer)
    before, began = everything(model, decor), progress(decor)
    get_optimizer_state_dict(model, optimizer)
    assert_equal(everything(model, decor), before)
    assert progress(decor) == began


def test_a_first_step_at_lr_0_is_one_all_the_same():
    """Schedules that warm up begin with it; R learns from its samples."""
    model, optimizer, decor = attached("adamw")
    optimizer.param_groups[0]["lr"] = 0.0
    before = everything(model, decor)
    train(model, optimizer, 0, 1)
    after = everything(model, decor)
    assert_learnt(after)
    assert torch.equal(before["W 0"], after["W 0"])
    assert decor._engine._steps == 1


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize(
    "options",
    [{}, {"full_state_dict": True}, {"cpu_offload": True}, {"flatten_optimizer_state_dict": True}],
    ids=lambda o: next(iter(o), "default"),
)
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path, optimizer, options):
    options = StateDictOptions(**options)
    whole = trained(6, optimizer)
    first = trained(3, optimizer)
    model_state, optimizer_state = get_state_dict(*first[:2], options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    second = attached(optimizer)
    model_state, optimizer_state = get_state_dict(*second[:2], options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        *second[:2],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    train(*second[:2], 3, 6)
    assert_equal(everything(second[0], second[2]), everything(whole[0], whole[2]))
    assert progress(second[2]) == progress(whole[2])


def test_a_budget_survives_a_full_distributed_checkpoint():
    """Which takes lists apart and puts them together by the shape of those that are there."""
    budget = {"budget": 0.2, "costs": "planned", "update_every": 1}
    options = StateDictOptions(full_state_dict=True)
    first, second = trained(7, **budget), attached(**budget)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(*first[:2], options=options))
    set_state_dict(
        *second[:2],
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    ours, theirs = (each[2]._engine._budget.schedule.state() for each in (second, first))
    assert ours == theirs
    for pair in (first, second):
        train(*pair[:2], 7, 9)
    assert_equal(everything(second[0], second[2]), everything(first[0], first[2]))


def test_a_state_of_other_layers_says_so_and_changes_nothing():
    first, second = trained(2), trained(1)
    before = everything(second[0], second[2])
    state = first[1].state_dict()
    layers = state["param_groups"][0]["dbp"]["layers"]
    layers["3"] = {**layers["3"], "R": torch.eye(4)}
    with pytest.raises(ValueError, match=r"R of '3' of shape \(4, 4\): expected \(128, 128\)"):
        second[1].load_state_dict(state)
    assert_equal(everything(second[0], second[2]), before)


def in_layer(**entries):
    def change(own):
        own["layers"]["3"] = {**own["layers"]["3"], **entries}

    return change


def in_progress(**entries):
    def change(own):
        own["progress"] = json.dumps({**json.loads(own["progress"]), **entries})

    return change


def of_another_model(own):
    own["layers"]["head"] = own["layers"].pop("3")


BROKEN = {
    "nan": (in_layer(R=torch.full((128, 128), torch.nan)), "R of '3' that has .* not finite"),
    "absurd": (in_layer(R=1e30 * torch.eye(128)), r"R of '3' that has entries up to 1e\+30"),
    "no tensor": (in_layer(R=None), "R of '3' that is a NoneType"),
    "W": (in_layer(W=torch.ones(5, 128).int()), "W of '3' that has dtype torch.int32"),
    "loss": (in_layer(loss=torch.ones(2)), r"'3' whose loss of shape \(2,\)"),
    "negative": (in_layer(skipped=torch.tensor(-1)), "'3' whose skipped=.*-1.*at least 0"),
    "bool": (in_layer(clipped=torch.tensor(True)), "'3' whose clipped=.*True"),
    "model": (of_another_model, "an R of 'head', which is no layer of this model"),
    "steps": (in_progress(steps=True), "steps=True"),
    "negative steps": (in_progress(steps=-3), "steps=-3"),
    "phases": (in_progress(phases=[0, 1.5]), "phases="),
    "budget": (in_progress(budget={"schedule": 3}), "budget="),
    "progress": (lambda own: own.update(progress="{"), "progress that is no JSON"),
    "generator": (lambda own: own.update(generator=torch.ones(3)), "no valid state"),
    "layers": (lambda own: own.update(layers=[]), "what attach has not saved"),
    "missing": (lambda own: own.pop("progress"), "what attach has not saved"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_state_is_refused_by_name_before_anything_changes(what):
    change, message = BROKEN[what]
    budget = {"budget": 0.2, "costs": "planned", "update_every": 1}
    first, second = trained(7, **budget), trained(2, **budget)
    state = first[1].state_dict()
    change(state["param_groups"][0]["dbp"])
    before, began = everything(second[0], second[2]), progress(second[2])
    plain = copy.deepcopy(second[1].state_dict())
    with pytest.raises(ValueError, match=message):
        second[1].load_state_dict(state)
    assert_equal(everything(second[0], second[2]), before)
    assert progress(second[2]) == began
    assert_equal(second[1].state_dict()["state"], plain["state"])
    # nor is it taken over from before attach, which leaves the optimiser as it was
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    optimizer.load_state_dict(state)
    own = dict(vars(optimizer))
    with pytest.raises(ValueError, match=message):
        dbp.attach(model, optimizer, **budget)
    assert vars(optimizer) == own
    assert not model._forward_pre_hooks
    assert not model[0]._forward_hooks


def test_warnings_made_errors_come_when_all_is_loaded():
    model, optimizer, decor = trained(2)
    plain = OPTIMIZERS["adamw"](make_model().parameters()).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no R of '0', '3'"):
            optimizer.load_state_dict(plain)
    assert torch.equal(decor.R("3"), torch.eye(128))
    assert torch.equal(decor.W("3"), model[3].weight)


def test_a_state_with_more_layers_names_those_it_ignores():
    first, second = trained(2), attached(exclude="3")
    with pytest.warns(UserWarning, match="an R of '3', which are not attached here"):
        second[1].load_state_dict(first[1].state_dict())
    assert_equal(second[2].R("0"), first[2].R("0"))


def by_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


def by_torch(objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_of_model_and_optimizer_is_a_plain_pair(copied):
    """It trains as a plain model with the weights A would, and the original goes on as it was."""
    whole = trained(5)
    model, optimizer, decor = trained(3)
    twin, twin_optimizer = copied((model, optimizer))
    plain, plain_optimizer = copied((model, optimizer))
    for module in plain.modules():  # this one without any hook of ours
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for pair in ((twin, twin_optimizer), (plain, plain_optimizer)):
        train(*pair, 3, 5)
    assert_equal(twin.state_dict(), plain.state_dict())
    train(model, optimizer, 3, 5)
    assert_equal(everything(model, decor), everything(whole[0], whole[2]))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_a_copied_pair_goes_on_once_it_is_attached_and_given_the_state(copied):
    whole = trained(5)
    model, optimizer, _ = trained(3)
    twin, twin_optimizer = copied((model, optimizer))
    decor = dbp.attach(twin, twin_optimizer, lr=1e-2, sample=0.5, update_every=2, sampling="random")
    twin_optimizer.load_state_dict(optimizer.state_dict())
    train(twin, twin_optimizer, 3, 5)
    assert_equal(everything(twin, decor), everything(whole[0], whole[2]))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_with_its_handle_is_an_attached_pair(copied):
    whole = trained(5)
    first = trained(3)
    model, optimizer, decor = copied(first)
    train(model, optimizer, 3, 5)
    assert_equal(everything(model, decor), everything(whole[0], whole[2]))
    train(*first[:2], 3, 5)
    assert_equal(everything(first[0], first[2]), everything(whole[0], whole[2]))
