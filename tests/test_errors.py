"""Errors of torch's own types, where torch's convolutions have some: OpInfo's, and absurd sizes."""

import time

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import dbp_kernels as dbp
from dbp_kernels.planning.geometry import GeometryError

CONVOLUTIONS = {f"nn.functional.conv{d}d": getattr(dbp, f"decor_conv{d}d") for d in (1, 2, 3)}


@pytest.mark.parametrize(
    "op", [op for op in op_db if op.name in CONVOLUTIONS], ids=lambda op: op.name
)
def test_error_inputs_of_torchs_convolutions(op):
    """R would fit, so that it is not what is wrong."""
    inputs = list(op.error_inputs("cpu"))
    assert len(inputs) > 5
    for error_input in inputs:
        sample = error_input.sample_input
        weight, *rest = sample.args
        with pytest.raises(error_input.error_type):
            op(sample.input, weight, *rest, **sample.kwargs)
        R = torch.eye(weight[0].numel())
        groups = sample.kwargs.get("groups", 1)
        R = R if groups == 1 else R.expand(max(0, groups), *R.shape)
        with pytest.raises(error_input.error_type):
            CONVOLUTIONS[op.name](sample.input, weight, R, *rest, **sample.kwargs)


@pytest.mark.parametrize("padding", [0, 2**62])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("value", [2**62, 2**63 - 1, 2**63, 2**64, -(2**62)])
def test_absurd_sizes_are_refused_at_once(name, value, padding):
    arguments = {"kernel_size": [3], "padding": padding, name: [value]}
    if name == "groups":
        arguments[name] = value
    start = time.thread_time()
    if (name, value, padding) == ("stride", 2**62, 0):  # what is right although it is absurd
        S = dbp.patch_gram(torch.ones(1, 1, 3), **arguments)
        assert torch.equal(S, torch.ones(1, 3, 3))
    else:
        with pytest.raises(GeometryError):
            dbp.patch_gram(torch.ones(1, 1, 3), **arguments)
    assert time.thread_time() - start < 0.1


def test_an_S_that_no_memory_holds_is_refused_before_it_is_planned():
    start = time.thread_time()
    with pytest.raises(RuntimeError):
        dbp.patch_gram(torch.ones(1, 1, 3), [2**24], padding=2**24)
    assert time.thread_time() - start < 0.1
