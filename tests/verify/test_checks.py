"""A check sees what can be wrong with a kernel: a lost pixel, an unwritten element, a race."""

import pytest
import torch

from dbp_kernels import reference
from dbp_kernels.verify import checks
from dbp_kernels.verify.checks import Check, convolution, moments

CPU = torch.device("cpu")
PROBLEM = convolution("3x3 6@9x8", (3, 6, 9, 8), 3, padding=1)


def right(x, geometry):
    return reference.patch_gram(x.double(), *PROBLEM.arguments).float()


def outcome(compute, precision="bf16"):
    return checks.run(Check("triton", "k", "t", precision, **moments(compute, PROBLEM)), CPU)


@pytest.mark.parametrize("precision", checks.DTYPES)
def test_right(precision):
    record = outcome(right, precision)
    assert record["status"] == "passed"
    assert record["error"] < 1e-6
    assert record["dtype"] == precision
    assert record["geometry"] == "3x3 6@9x8"


def lost_pixel(x, geometry):
    x = x.clone()
    x[-1, :, -1, -1] = 0
    return right(x, geometry)


def unwritten(x, geometry):
    S = torch.empty(1, geometry.dim, geometry.dim)  # NaN within a check
    S[:, 1:] = right(x, geometry)[:, 1:]
    return S


def transposed_taps(x, geometry):
    return right(x.mT.contiguous().reshape(x.shape), geometry)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("compute", [lost_pixel, unwritten, transposed_taps])
def test_wrong(compute, precision):
    record = outcome(compute, precision)
    assert record["status"] == "failed"
    assert "above the bound" in record["reason"]


def test_two_runs_that_differ():
    calls = []

    def racing(x, geometry):
        calls.append(None)
        return right(x, geometry) * (1 + len(calls) * 1e-7)

    record = outcome(racing)
    assert record["status"] == "failed"
    assert record["reason"] == "two runs on the same input differ"


def test_settings_are_as_before():
    before = torch.backends.cuda.matmul.fp32_precision

    def fail(x, geometry):
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        outcome(fail, "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert not torch.are_deterministic_algorithms_enabled()
