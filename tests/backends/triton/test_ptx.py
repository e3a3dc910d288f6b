"""Whole ops on compiled code: every launch's PTX for sm_80 and sm_90 run in the simulator.

Kernel by kernel, tile by tile, this is done beside each kernel's tests; here the ops run as the
planner composes them, in bfloat16 too, which the interpreter cannot multiply.
"""

import pytest
import simulator
import torch
from helpers import case, error, rows

import dbp_kernels as dbp
from dbp_kernels import reference
from dbp_kernels.backends.triton import ops
from dbp_kernels.planning.choice import Choice

pytestmark = pytest.mark.ptx

CASES = {
    "3x3": case(2, 19, (7, 5), 3, padding=1),
    "strided": case(3, 6, (9, 8), (3, 2), stride=2, padding=(1, 0), groups=2),
    "stem": case(2, 3, (11, 13), 5, stride=2, padding=2),
    "1x1": case(2, 33, (5, 3), 1),
    "3d": case(1, 3, (3, 5, 4), 2, padding=1),
    "rows": rows((45, 18)),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gram(target, seed, precision, name, x, geometry):
    torch.set_float32_matmul_precision(precision)
    with simulator.simulated(target, seed):
        return ops.patch_gram(x, geometry, Choice(name, 0.0, 0.0))


def update(target, seed, precision, x, R, arguments, options):
    torch.set_float32_matmul_precision(precision)
    with simulator.simulated(target, seed), dbp.backend("triton"):
        R_new, loss = torch.ops.dbp.decor_update(x, R, *arguments, *options)
        return R_new, loss, *torch.ops.dbp.decor_stats(x, R, *arguments)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [80, 90])
def test_patch_gram(compiled, target, dtype, c):
    for seed, precision in enumerate(("highest", "high")[: 1 + (dtype == torch.float32)]):
        x = c.input(dtype, seed=seed)
        exact = reference.patch_gram(x.double(), *c.arguments)
        for name in ("triton_shift", "triton_direct")[0 if c.kernel else 1 :]:
            S = compiled(gram, target, seed, precision, name, x, c.geometry)
            assert error(S, exact) < (2e-3 if precision == "high" else 2e-6), (name, precision)


@every_case
@pytest.mark.parametrize("target", [80, 90])
def test_update_and_statistics(compiled, target, c):
    options = (0.1, 0.4, "standard", True)
    for seed, (dtype, precision) in enumerate(
        [(torch.bfloat16, "high"), (torch.float32, "highest")]
    ):
        x, R = c.input(dtype, seed=seed), c.R(torch.float32, seed=seed + 5)
        got = compiled(update, target, seed, precision, x, R, c.arguments, options)
        high = x.double(), R.double(), *c.arguments
        exact = *reference.decor_update(*high, *options), *reference.decor_stats(*high)
        for g, e in zip(got, exact):
            assert error(g, e.reshape(g.shape)) < (5e-3 if precision == "high" else 1e-5)
