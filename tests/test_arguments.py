"""Arguments at the edges: what torch accepts is accepted, the rest is named before anything runs."""

import numpy as np
import pytest
import torch

import dbp_kernels as dbp


def test_numpy_integers_are_ints():
    x, R = torch.randn(2, 3, 8, 8), torch.randn(27, 27)
    weight = torch.randn(4, 3, 3, 3)
    two = np.int64(2)
    assert torch.equal(
        dbp.decor_conv2d(x, weight, R, stride=two), dbp.decor_conv2d(x, weight, R, stride=2)
    )
    assert torch.equal(
        dbp.patch_gram(x, np.int64(3), padding=(two, 1)), dbp.patch_gram(x, 3, padding=(2, 1))
    )


def test_no_features_and_no_outputs():
    assert torch.equal(
        dbp.decor_linear(torch.randn(2, 0), torch.randn(3, 0), torch.zeros(0, 0)), torch.zeros(2, 3)
    )
    assert dbp.decor_linear(torch.randn(2, 4), torch.randn(0, 4), torch.eye(4)).shape == (2, 0)


@pytest.mark.parametrize(("name", "value"), [("stride", 9), ("padding", 3), ("dilation", (2,))])
def test_a_linear_patch_has_no_window(name, value):
    with pytest.raises(ValueError, match=name):
        dbp.patch_gram(torch.randn(4, 3), (), **{name: value})
    arguments = {"stride": [], "padding": [], "dilation": [], name: [2]}
    with pytest.raises(ValueError, match=name):
        torch.ops.dbp.patch_gram(torch.randn(4, 3), [], *arguments.values(), 1)


def test_a_linear_patch_may_say_it_has_no_window():
    x = torch.randn(4, 3)
    plain = dbp.patch_gram(x, ())
    assert torch.equal(dbp.patch_gram(x, (), stride=(1, 1), padding=(0, 0), dilation=1), plain)
    assert torch.equal(dbp.patch_gram(x, [], padding="valid"), plain)


def test_four_spatial_dimensions_are_refused():
    x = torch.randn(1, 2, 3, 3, 3, 3)
    with pytest.raises(ValueError, match="kernel_size"):
        torch.ops.dbp.decorrelate(x, torch.eye(2), [1] * 4, [1] * 4, [0] * 4, [1] * 4, 1)


def test_operands_on_two_devices_are_refused():
    x, R = torch.randn(1, 2, 4, 4), torch.eye(18)
    for call in (dbp.decor_stats, lambda *a: dbp.decor_update(*a, lr=0.1)):
        with pytest.raises(ValueError, match="R is on meta"):
            call(x, R.to("meta"), 3)
        with pytest.raises(ValueError, match="R is on cpu"):
            call(x.to("meta"), R, 3)


def test_eight_bit_floats_and_lists_are_refused():
    with pytest.raises(TypeError, match=r"input has dtype torch.float8"):
        dbp.patch_gram(torch.randn(1, 2, 4, 4).to(torch.float8_e4m3fn), 3)
    with pytest.raises(TypeError, match="input is a list"):
        dbp.patch_gram([[1.0]], 3)


def test_fake_kernels_name_bad_arguments():
    with pytest.raises(ValueError, match="R has shape"):
        dbp.decor_stats(torch.empty(1, 2, 4, 4, device="meta"), torch.empty(3, 3, device="meta"), 3)


def test_operands_that_are_no_tensors_are_named():
    x, weight, R = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.eye(18)
    calls = {
        "condensed_weight": {"weight": weight, "R": R},
        "condensed_weight_transposed": {"weight": weight, "R": torch.eye(3)},
        "decor_conv2d": {"input": x, "weight": weight, "R": R},
        "decor_conv_transpose2d": {"input": x, "weight": weight[:2], "R": torch.eye(2)},
        "decor_linear": {"input": x, "weight": torch.randn(3, 4), "R": torch.eye(4)},
        "decorrelate": {"input": x, "R": R, "kernel_size": 3},
        "decor_stats": {"input": x, "R": R, "kernel_size": 3},
        "decor_update": {"input": x, "R": R, "kernel_size": 3, "lr": 0.1},
        "patch_gram": {"input": x, "kernel_size": 3},
    }
    for name, arguments in calls.items():
        getattr(dbp, name)(**arguments)
        for operand in ("input", "weight", "R"):
            if operand in arguments:
                with pytest.raises(TypeError, match=rf"{operand} is a NoneType: expected a Tensor"):
                    getattr(dbp, name)(**{**arguments, operand: None})


def test_layers_name_an_input_that_is_no_tensor():
    for layer in (dbp.nn.DecorLinear(2, 3), dbp.nn.DecorConv2d(2, 3, 3), dbp.nn.Decorrelate(2)):
        with pytest.raises(TypeError, match="input is a list: expected a Tensor"):
            layer([1.0, 2.0])


def test_a_meta_R_is_refused_where_the_rest_is_not():
    x, weight, R = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.eye(18, device="meta")
    with pytest.raises(ValueError, match="R is on meta: expected the weight's device cpu"):
        dbp.decor_conv2d(x, weight, R)
    with pytest.raises(ValueError, match="R is on meta: expected the input's device cpu"):
        dbp.decorrelate(x, R, 3)
    linear = dbp.nn.DecorLinear(4, 2)
    linear.R = linear.R.to("meta")
    with pytest.raises(ValueError, match="R is on meta"):
        linear(x)


def test_a_bool_is_no_size():
    with pytest.raises(TypeError, match="padding=True: expected an int"):
        dbp.patch_gram(torch.randn(1, 2, 4, 4), 3, padding=True)


def test_groups_of_a_weight_are_an_int():
    with pytest.raises(TypeError, match="groups='2': expected an int"):
        dbp.condensed_weight(torch.randn(2, 3), torch.eye(3), "2")
    with pytest.raises(ValueError, match=r"weight has shape \(\)"):
        dbp.condensed_weight(torch.tensor(1.0), torch.eye(1))


def test_a_rate_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"lr=1e\+300: expected a number from 0 to 3\.4e\+38"):
        dbp.decor_update(torch.randn(4, 3), torch.eye(3), (), lr=1e300)
    for lr in (1e300, 10**400, True, "fast"):
        with pytest.raises(ValueError, match=r"lr=.*expected a finite number from 0 to"):
            dbp.DecorUpdate(dbp.nn.DecorLinear(3, 2), lr=lr)
    with pytest.raises(ValueError, match=r"update_every=10+: expected an int"):
        dbp.DecorUpdate(dbp.nn.DecorLinear(3, 2), update_every=10**400)


def test_what_is_no_model_or_choice_of_layers_is_named():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    many = torch.ones(2, 2)
    refused = {
        "model=str": lambda: dbp.DecorUpdate("net"),
        "model=Tensor": lambda: dbp.DecorUpdate(many),
        "model must be": lambda: dbp.explain([net], torch.randn(2, 3)),
        "optimizer=tensor": lambda: dbp.attach(net, many),
        "groups=3": lambda: dbp.attach(net, optimizer, groups=3),
        "max_size='8'": lambda: dbp.attach(net, optimizer, max_size="8"),
        "include=tensor": lambda: dbp.attach(net, optimizer, include=many),
        "report=tensor": lambda: dbp.decorrelate_model(net, report=many),
        "name=tensor": lambda: dbp.backend(many).__enter__(),
        "num_features": lambda: dbp.nn.Decorrelate(2**62),
        "padding_mode=tensor": lambda: dbp.patch_gram(
            torch.randn(1, 2, 4, 4), 3, padding_mode=many
        ),
        "stride=tensor": lambda: dbp.patch_gram(torch.randn(4, 3), (), stride=many),
    }
    for message, call in refused.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()
    assert type(net[0]) is torch.nn.Linear
    assert not net[0]._forward_hooks
