"""Geometry: sizes as in torch, bad arguments."""

import pytest
import torch
from helpers import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dbp_kernels.planning.geometry import ConvGeometry, make_geometry, same_padding

CONV = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}


@settings(max_examples=150)
@given(cases(min_batch=0))
def test_sizes_are_those_of_torch(case):
    g = case.geometry
    x = torch.empty(case.shape, device="meta")
    weight = torch.empty((case.groups, case.channels // case.groups, *case.kernel), device="meta")
    _, stride, padding, dilation, groups = case.arguments
    y = CONV[len(case.size)](x, weight, None, stride, padding, dilation, groups)
    assert g.output_size == y.shape[2:]
    assert g.positions == y[0:1, 0].numel() or case.batch == 0
    assert g.samples == y[:, 0].numel()
    assert g.dim == weight[0].numel()
    assert g.input_numel == x.numel()
    assert g.kernel_size == case.kernel
    assert g.with_batch(7).samples == 7 * g.positions


@settings(max_examples=200)
@given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)
def test_a_kernel_that_does_not_fit_fails_exactly_as_in_torch(
    size, kernel, stride, padding, dilation
):
    arguments = ([stride], [padding], [dilation], 1)
    try:
        torch.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, *arguments)
        message = None
    except RuntimeError as torch_error:
        message = str(torch_error)
    if message is None:
        make_geometry((1, 1, size), [kernel], *arguments)
    else:
        with pytest.raises(RuntimeError) as ours:
            make_geometry((1, 1, size), [kernel], *arguments)
        assert str(ours.value).startswith("Calculated padded input size per channel")
        assert "Kernel size can't be greater than actual input size" in str(ours.value)
        assert "Kernel size can't be greater than actual input size" in message


def test_rows():
    g = make_geometry((2, 3, 8), [], [], [], [], 2)
    assert (g.samples, g.dim, g.groups, g.taps, g.axes, g.pointwise) == (6, 4, 2, 1, (), True)
    assert make_geometry((8,), [], [], [], [], 1).samples == 1
    assert make_geometry((0, 8), [], [], [], [], 1).samples == 0


def test_pointwise():
    def pointwise(kernel, padding):
        return make_geometry((1, 2, 5, 5), kernel, [2, 1], padding, [1, 1], 1).pointwise

    assert pointwise([1, 1], [0, 0])
    assert not pointwise([1, 1], [0, 1])  # patches that read padding only
    assert not pointwise([1, 2], [0, 0])


def test_one_entry_stands_for_all_axes():
    full = make_geometry((1, 2, 9, 9), [3, 3], [2, 2], [1, 1], [2, 2], 1)
    assert make_geometry((1, 2, 9, 9), [3, 3], [2], [1], [2], 1) == full


def test_equal_geometries_are_one_key():
    a = make_geometry((2, 4, 9, 9), [3, 3], [1, 1], [1, 1], [1, 1], 2)
    b = make_geometry((2, 4, 9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 2)
    assert a == b
    assert hash(a) == hash(b)
    assert isinstance(a, ConvGeometry)


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"groups": 0}, "groups", "0"),
        ({"groups": -1}, "groups", "-1"),
        ({"groups": 3}, "groups", "3"),
        ({"shape": (4, 8, 8)}, "input", "(4, 8, 8)"),
        ({"shape": (1, 2, 4, 8, 8)}, "input", "(1, 2, 4, 8, 8)"),
        ({"shape": (), "kernel_size": []}, "input", "0-dimensional"),
        ({"kernel_size": [3, 3, 3, 3]}, "kernel_size", "[3, 3, 3, 3]"),
        ({"kernel_size": [0, 3]}, "kernel_size", "[0, 3]"),
        ({"stride": [1, 0]}, "stride", "[1, 0]"),
        ({"stride": [1, 1, 1]}, "stride", "[1, 1, 1]"),
        ({"stride": []}, "stride", "[]"),
        ({"padding": [-1, 0]}, "padding", "[-1, 0]"),
        ({"padding": [1, 1, 1]}, "padding", "[1, 1, 1]"),
        ({"dilation": [0, 1]}, "dilation", "[0, 1]"),
        ({"dilation": [1, 1, 1]}, "dilation", "[1, 1, 1]"),
    ],
)
def test_bad_arguments_are_named(change, name, value):
    good = {
        "shape": (1, 4, 8, 8),
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    make_geometry(**good)
    with pytest.raises(ValueError, match=name) as info:
        make_geometry(**(good | change))
    assert value in str(info.value)


@pytest.mark.parametrize("kernel", range(1, 7))
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_keeps_the_size(kernel, dilation):
    low, high = same_padding(kernel, dilation)
    assert 0 <= high - low <= 1
    assert low + high == dilation * (kernel - 1)
