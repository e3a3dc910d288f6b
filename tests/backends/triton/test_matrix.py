"""Every (kernel, shipped configuration, dtype) on every geometry, against the float64 oracle.

Outputs and workspaces are filled with NaN first. On a device the layers are of real size; in the
interpreter they are small, and tiles are those of sm_90.
"""

import pytest
import torch
from helpers import DEVICE, case, error, moment_error, rows

from dbp_kernels import reference, rules
from dbp_kernels.backends.triton import (
    configs,
    gram_direct,
    gram_shift,
    gram_shift_tma,
    runtime,
    stats,
    update,
)

SMALL = {
    "3x3": case(1, 20, (5, 4), 3),
    "strided, groups": case(2, 6, (5, 4), (3, 2), stride=2, padding=(1, 0), groups=2),
    "1x1": case(3, 18, (5, 4), 1),
    "rows": rows((70, 20)),
}
LARGE = {
    "3x3": case(8, 64, (56, 56), 3, padding=1),
    "3x3, many channels": case(4, 512, (7, 7), 3, padding=1),
    "strided, groups": case(8, 96, (29, 28), (3, 2), stride=2, padding=(1, 0), groups=3),
    "stem": case(8, 3, (112, 112), 7, stride=2, padding=3),
    "depthwise": case(4, 72, (28, 28), 3, padding=1, groups=72),
    "5x5, dilated": case(4, 40, (27, 27), 5, padding=4, dilation=2),
    "1x1": case(8, 256, (14, 14), 1),
    "1d": case(16, 33, (1000,), 7, padding=3),
    "3d": case(2, 17, (9, 12, 11), 3, padding=1),
    "rows": rows((3000, 200)),
}
GEOMETRIES = LARGE if DEVICE.type == "cuda" else SMALL
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
GRAMS = {
    "gram_shift": gram_shift.patch_gram_shift,
    "gram_shift_tma": gram_shift_tma.patch_gram_shift_tma,
    "gram_direct": gram_direct.patch_gram_direct,
}
TARGET = runtime.target(DEVICE)
# tf32 keeps 10 bits of each operand; other products are exact, and their sums in float32
BOUND = {"tf32": 4e-3}


def shipped(*kernels):
    return [
        pytest.param(kernel, precision, dtype, config, id=f"{kernel}-{precision}-{config.text}")
        for kernel in kernels
        for precision, dtype in DTYPES.items()
        for config in configs._family(TARGET)[kernel].get(precision, ())
    ]


@pytest.fixture(autouse=True)
def _precision(request):
    before = torch.get_float32_matmul_precision()
    wanted = getattr(request.node, "callspec", None)
    tf32 = wanted and wanted.params.get("precision") == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    yield
    torch.set_float32_matmul_precision(before)


pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(("kernel", "precision", "dtype", "config"), shipped(*GRAMS))
def test_patch_gram(kernel, precision, dtype, config):
    for name, c in GEOMETRIES.items():
        if (kernel == "gram_direct" and c.geometry.pointwise) or not c.kernel:
            continue
        x = c.input(dtype, layout="channels_last").to(DEVICE)
        if kernel == "gram_shift_tma" and not gram_shift_tma.usable(x, c.geometry):
            pytest.skip("needs a GPU with tensor descriptors")
        S = GRAMS[kernel](x, c.geometry, config)
        exact = reference.patch_gram(x.double(), *c.arguments)
        assert moment_error(S, exact) < BOUND.get(precision, 1e-5), name
        if DEVICE.type == "cpu":
            continue
        again = GRAMS[kernel](x, c.geometry, config)
        assert torch.equal(S, again), f"{name}: two runs differ"


@pytest.mark.parametrize(("kernel", "precision", "dtype", "config"), shipped("gram_shift"))
@pytest.mark.parametrize("name", ["1x1", "rows"])
def test_plain_products(name, kernel, precision, dtype, config):
    """1x1 convolutions and linear layers: the direct form of these is the shift form without shift."""
    c = GEOMETRIES[name]
    x = c.input(dtype).to(DEVICE)
    S = gram_direct.patch_gram_direct(x, c.geometry, config)
    exact = reference.patch_gram(x.double(), *c.arguments)
    assert moment_error(S, exact) < BOUND.get(precision, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("precision", "config"),
    [p.values[1::2] for p in shipped("decor_stats")],
    ids=lambda v: getattr(v, "text", v),
)
def test_statistics(precision, config, dtype):
    tried = 0
    for name, c in GEOMETRIES.items():
        if c.geometry.dim > config.block_m or not stats.readable(c.geometry):
            continue
        tried += 1
        x, R = c.input(dtype).to(DEVICE), c.R(torch.float32).to(DEVICE)
        got = stats.decor_stats(x, R, c.geometry, config=config)[:2]
        for g, e in zip(got, reference.decor_stats(x.double(), R.double(), *c.arguments)):
            assert error(g, e.reshape(g.shape)) < BOUND.get(precision, 1e-5), name
    if not tried:
        pytest.skip("no geometry here is small enough")


@pytest.mark.parametrize(
    ("precision", "config"),
    [p.values[1::2] for p in shipped("symmetric_update")],
    ids=lambda v: getattr(v, "text", v),
)
def test_update(precision, config):
    large = DEVICE.type == "cuda"
    sizes = ((3, 576), (1, 1152), (5, 27), (2, 147)) if large else ((2, 24), (1, 35), (2, 16))
    for groups, dim in sizes:
        if dim % 16 and not update.fits_any_size(config):
            continue  # such tiles are for sizes that are multiples of 16
        generator = torch.Generator().manual_seed(dim)
        Z = torch.randn(groups, 2 * dim, dim, generator=generator)
        S = (Z.mT @ Z / (2 * dim)).to(DEVICE)
        R = torch.eye(dim, device=DEVICE) + 0.1 * (Z[:, :dim] / dim**0.5).to(DEVICE)
        rule = rules.UpdateRule.make("standard", 0.4, dim)
        due = update.gram_update(S, R, rule, config=config)
        got = due.new(R, 0.1), due.loss
        exact = rules.update_from_gram(S.double(), R.double(), 0.1, 0.4)
        for g, e in zip(got, exact):
            assert error(g, e) < BOUND.get(precision, 1e-5), (groups, dim)
