"""The shift form against the float64 definition."""

import pytest
import torch
from helpers import DEVICE, LAYOUTS, case, cases, moment_error
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import reference
from dbp_kernels.backends.triton.configs import Config
from dbp_kernels.backends.triton.gram_shift import patch_gram_shift

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Config(16, 16, 16, 4, 2)


def check(case_, x, S):
    """Products are exact in float32 for 16-bit inputs; only sums round."""
    oracle = reference.patch_gram(x.double(), *case_.arguments)
    assert moment_error(S.cpu(), oracle) < 1e-5
    assert torch.equal(S, S.mT)


@given(case_=cases(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_any_geometry(case_, dtype, layout):
    x = case_.input(dtype, layout=layout)
    S = patch_gram_shift(x.to(DEVICE), case_.geometry, SMALL, parallel=3)
    check(case_, x, S)


CASES = [
    case(2, 40, (7, 6), 3, padding=1),
    case(3, 24, (9, 8), 3, stride=2, padding=1, groups=2),
    case(2, 33, (12,), 5, padding=2),
    case(1, 17, (4, 5, 3), (2, 3, 1), padding=1),
]


@pytest.mark.parametrize("case_", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_configuration(case_, dtype):
    x = case_.input(dtype, layout="channels_last")
    check(case_, x, patch_gram_shift(x.to(DEVICE), case_.geometry))
