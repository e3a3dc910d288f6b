"""The shift form against the float64 definition, interpreted and compiled."""

import itertools

import pytest
import simulator
import torch
from helpers import DEVICE, LAYOUTS, case, cases, moment_error, random, strided
from hypothesis import given
from hypothesis import strategies as st

from dbp_kernels import reference
from dbp_kernels.backends.rows import in_rows
from dbp_kernels.backends.triton import runtime
from dbp_kernels.backends.triton.configs import Config, configs
from dbp_kernels.backends.triton.gram_shift import patch_gram_shift, shift_gram
from dbp_kernels.backends.triton.pack import pack
from dbp_kernels.planning.kept import size_of

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Config(16, 16, 16, 4, 2)


def check(case_, x, S, precision="ieee"):
    """Products of 16-bit numbers are exact in float32, so only sums round."""
    oracle = reference.patch_gram(x.double(), *case_.arguments)
    assert moment_error(S.cpu(), oracle) < (2e-3 if precision == "tf32" else 1e-5)
    assert torch.equal(S, S.mT)


@given(
    case_=cases(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    parallel=st.sampled_from([1, 40]),
)
def test_any_geometry(case_, dtype, layout, parallel):
    x = case_.input(dtype, layout=layout)
    S = patch_gram_shift(x.to(DEVICE), case_.geometry, SMALL, parallel)
    check(case_, x, S)


def test_rows_with_room_are_not_copied():
    x = random((2, 13, 6, 7), torch.bfloat16).to(DEVICE)
    roomy = strided(x, "rows")
    geometry = case(2, 13, (6, 7), 3, padding=1).geometry
    in_place, copying = shift_gram(roomy, geometry), shift_gram(x, geometry)
    assert pack not in in_place.steps
    assert copying.steps == (pack,)
    assert torch.equal(in_place(roomy), copying(x))


def test_what_is_kept_is_counted_with_its_tables():
    geometry = case(2, 16, (7, 7), 5, padding=2).geometry
    gram = shift_gram(random((2, 16, 7, 7), torch.float32).to(DEVICE), geometry)
    launches = (*gram.products, gram.reduce)
    tables = [x for own in launches for x in own._fixed if isinstance(x, torch.Tensor)]
    assert len(tables) >= 4
    assert size_of(gram) > sum(table.nbytes for table in tables)


CASES = [
    case(2, 40, (7, 6), 3, padding=1),
    case(3, 24, (9, 8), 3, stride=2, padding=1, groups=2),
    case(2, 33, (12,), 5, padding=2),
    case(1, 17, (4, 5, 3), (2, 3, 1), padding=1),
    case(2, 20, (6, 5), 2, groups=20),
]


@pytest.mark.parametrize(("case_", "dtype"), list(zip(CASES, itertools.cycle(DTYPES))), ids=str)
def test_own_configuration(case_, dtype):
    x = case_.input(dtype, layout="channels_last")
    check(case_, x, patch_gram_shift(x.to(DEVICE), case_.geometry))


@pytest.mark.parametrize("case_", CASES[1:3], ids=str)
def test_forced_64_bit_addresses_change_nothing(case_):
    x = case_.input(torch.float32).to(DEVICE)
    S = patch_gram_shift(x, case_.geometry, SMALL, 20)
    assert torch.equal(S, patch_gram_shift(x, case_.geometry, SMALL, 20, index64=True))


@pytest.mark.parametrize("case_", CASES[1:3], ids=str)
def test_two_runs_agree_bit_for_bit(case_):
    x = case_.input(torch.bfloat16).to(DEVICE)
    runs = [patch_gram_shift(x, case_.geometry) for _ in range(2)]
    assert torch.equal(*runs)


def test_taps_that_read_padding_everywhere_give_zeros():
    case_ = case(2, 3, (1, 1), 2, stride=9, padding=4, dilation=5)
    S = patch_gram_shift(case_.input(torch.float32).to(DEVICE), case_.geometry, SMALL)
    assert S.count_nonzero() == 0


def test_infinity_stays_with_the_taps_that_see_it():
    case_ = case(1, 2, (6, 6), 3)
    x = case_.input(torch.float32)
    x[0, 0, 0, 0] = torch.inf  # only the first tap of channel 0 reads this corner
    S = patch_gram_shift(x.to(DEVICE), case_.geometry, SMALL).cpu()
    assert S[0, 1:, 1:].isfinite().all()
    assert not S[0, 0].isfinite().any()


# --------------------------------------------------------------------------- compiled code

COMPILED = [  # the larger the tile, the fewer the boxes
    (case(3, 70, (90,), 3, padding=1), case(2, 133, (41,), 2, dilation=2)),
    (case(3, 70, (9,), 4, padding=2, dilation=2), case(2, 65, (5, 7), 2, groups=5)),
    (case(2, 24, (9, 7), 3, stride=2, padding=1, groups=2), case(2, 37, (5, 3), (1, 2))),
    (case(2, 17, (6, 5), 3, padding=1), case(1, 9, (4, 5, 3), (2, 3, 1), padding=1)),
]
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}


@pytest.mark.ptx
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("number", range(4))
def test_compiled_code(compiled, target, precision, number):
    """Every shipped tile, with 32-bit and 64-bit addresses."""
    shipped = configs("gram_shift", precision, target)
    if number >= len(shipped):
        pytest.skip("fewer configurations are shipped")
    cases_ = COMPILED[number] if precision != "ieee" else COMPILED[number + 1]
    for index64, case_ in enumerate(cases_):
        layout = ("channels_last", "rows")[index64]
        x = case_.input(PRECISIONS[precision], layout=layout, seed=number)
        arguments = case_.geometry, shipped[number], 5, bool(index64)
        S = compiled(run_simulated, target, precision, x, *arguments)
        check(case_, x, S, precision)


def run_simulated(target, precision, x, *arguments):
    assert not runtime.INTERPRET
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with simulator.simulated(target, seed=sum(precision.encode())) as launched:
            S = patch_gram_shift(x, *arguments)
        packs = [] if in_rows(x) else ["pack_kernel"]
        assert launched == [*packs, "gram_shift_kernel", "reduce_kernel"]
        return S
    finally:
        torch.set_float32_matmul_precision("highest")
