"""What the handle of ``dbp.attach`` tells, and what is left of it after ``detach()``."""

import gc
import weakref

import pytest
import torch
from small_training import assert_equal, attached, everything, train, trained

from dbp_kernels.choose import update_choices
from dbp_kernels.planning.geometry import make_geometry


def plans():
    """Of the two layers, for the two images that a step of small_training samples."""
    window = [3, 3], [1, 1], [1, 1], [1, 1], 1
    shapes = ((2, 3, 4, 4), *window), ((2, 128), [], [], [], [], 1)
    geometries = [make_geometry(*shape) for shape in shapes]
    return [update_choices(g, "cpu", torch.float32, "eager")[0].name for g in geometries]


def test_decorrelated_tells_size_and_plan():
    model, optimizer, decor = attached(update_every=1)
    assert decor.decorrelated() == {
        "0": "R 27 x 27, 0.00 MiB",
        "3": "R 128 x 128, 0.06 MiB",
    }
    train(model, optimizer, 0, 1)
    conv, linear = plans()
    assert conv != linear
    assert decor.decorrelated() == {
        "0": f"R 27 x 27, 0.00 MiB, plan {conv}",
        "3": f"R 128 x 128, 0.06 MiB, plan {linear}",
    }
    before = everything(model, decor)
    assert str(decor) == "\n".join(
        [
            "Attached (2 layers, R 0.1 MiB)",
            "  group 0: 2 layers, lr=0.01, kappa=0.5, sample=0.5, rule='standard', "
            "update_every=1, demean=False, sampling='random', clip=0.5",
            "  cuda_graph=True",
            f"  0: R 27 x 27, 0.00 MiB, plan {conv}",
            f"  3: R 128 x 128, 0.06 MiB, plan {linear}",
        ]
    )
    assert_equal(everything(model, decor), before)


def test_after_detach_it_tells_how_things_were():
    model, optimizer, decor = trained(2)
    R, losses, skipped = decor.R("0").clone(), decor.losses(), decor.skipped()
    decor.detach()
    decor.detach()  # twice does no harm
    train(model, optimizer, 2, 3)
    assert torch.equal(decor.R("0"), R)
    assert_equal(decor.losses(), losses)
    assert_equal(decor.skipped(), skipped)
    assert list(decor.decorrelated()) == ["0", "3"]
    assert "detached" in repr(decor)
    with pytest.raises(RuntimeError, match=r"transform_gradients\(\) after detach\(\)"):
        decor.transform_gradients()


def test_nothing_of_ours_is_left_on_a_detached_optimizer():
    model, optimizer, decor = trained(2)
    decor.detach()
    plain = torch.optim.AdamW(model.parameters())
    assert vars(optimizer).keys() == vars(plain).keys()
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    for name, hooks in vars(optimizer).items():
        if name.endswith("hooks"):
            assert not hooks, name
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["nothing", "1"])
@pytest.mark.parametrize("accessor", ["R", "W"])
def test_a_layer_that_is_not_attached_is_named(accessor, name):
    _, _, decor = attached()
    with pytest.raises(KeyError, match=rf"no layer '{name}' is attached: expected one of"):
        getattr(decor, accessor)(name)


def test_schedule_without_a_budget():
    with pytest.raises(RuntimeError, match=r"no budget: expected dbp\.attach\(budget=\.\.\.\)"):
        attached()[2].schedule()
    assert "warming up" in str(attached(budget=0.1, update_every=1)[2].schedule())


def test_after_detach_nothing_waits_for_the_garbage_collector():
    model, optimizer, decor = attached(update_every=1)
    train(model, optimizer, 0, 1)
    alive = [weakref.ref(one) for one in (model, optimizer, decor, model[0].weight, decor.R("0"))]
    gc.collect()
    gc.disable()
    try:
        decor.detach()
        del model, optimizer, decor
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()
