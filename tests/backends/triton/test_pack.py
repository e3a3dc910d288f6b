"""Packing against torch's own copies: every element equal, every element written."""

import pytest
import simulator
import torch
from helpers import DEVICE, LAYOUTS, cases, random, strided
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels.backends.rows import in_rows, padded
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.pack import merged, pack, pack_into

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(source, dtype):
    """The interpreter truncates where GPUs round to the nearest bfloat16."""
    return not runtime.INTERPRET or dtype != torch.bfloat16 or source == dtype


def check(packed, expected, exact=True):
    channels = expected.shape[1]
    assert in_rows(packed)
    if exact:
        assert torch.equal(packed[:, :channels].cpu(), expected)
    else:
        torch.testing.assert_close(packed[:, :channels].cpu(), expected, rtol=2**-7, atol=0)
    assert packed.shape[1] == padded(channels, packed.dtype)
    assert not packed[:, channels:].any()  # written, and zero


@given(
    case_=cases(max_channels=12),
    layout=st.sampled_from(LAYOUTS),
    source=st.sampled_from(DTYPES),
    dtype=st.sampled_from([None, *DTYPES]),
    index64=st.booleans(),
)
def test_any_layout(case_, layout, source, dtype, index64):
    x = case_.input(source, layout=layout)
    dtype = dtype or source
    check(pack(x.to(DEVICE), dtype, index64=index64), x.to(dtype), exact(source, dtype))


@pytest.mark.parametrize("shape", [(3, 70, 9, 11), (2, 5, 300), (1, 130, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tiles(shape, layout):
    x = strided(random(shape, torch.float32), layout)
    check(pack(x.to(DEVICE)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_is_subtracted_before_rounding(dtype):
    x = random((4, 5, 3, 2), torch.float32) + 1000
    mean = x.mean((0, 2, 3))
    expected = (x - mean.view(5, 1, 1)).to(dtype)
    check(pack(x.to(DEVICE), dtype, mean.to(DEVICE)), expected, exact(torch.float32, dtype))


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
@pytest.mark.parametrize(
    ("source", "dtype"), [(s, d) for s in DTYPES[::2] for d in DTYPES], ids=str
)
def test_compiled_code(compiled, target, layout, source, dtype):
    x = strided(random((2, 19, 5, 9), source), layout)
    mean = random((19,), torch.float32)
    check(compiled(packed_in_simulator, target, x, dtype, None), x.to(dtype))
    expected = (x.float() - mean.view(19, 1, 1)).to(dtype)
    check(compiled(packed_in_simulator, target, x, dtype, mean), expected)


def packed_in_simulator(target, x, dtype, mean):
    with simulator.simulated(target, seed=target):
        return pack(x, dtype, mean, index64=mean is not None)


def test_into_another_order_of_pixels():
    x = random((3, 10, 5, 4), torch.bfloat16)
    buffer = torch.full((5, 6, 3, 16), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pack_into(buffer[:, 1:5].permute(2, 3, 0, 1), x.to(DEVICE))
    check(buffer[:, 1:5].permute(2, 3, 0, 1), x)
    assert buffer[:, [0, 5]].isnan().all()


def test_nothing_to_copy():
    assert pack(torch.empty(0, 3, 2, 2, device=DEVICE)).shape == (0, 4, 2, 2)


def test_dimensions_are_merged():
    assert merged((2, 6, 4, 5), (120, 20, 5, 1), (720, 120, 30, 6)) == [(240, 1, 6)]
    assert merged((2, 1, 4, 5), (100, 7, 5, 1), (20, 9, 5, 1)) == [(2, 100, 20), (20, 1, 1)]
