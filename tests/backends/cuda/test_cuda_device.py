"""The compiled kernels on a GPU: what the emulation cannot tell. Skipped without one.

``python csrc/build.py --in-place`` builds the library these tests use.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYOUTS, case, error, moment_error, random, rows, updated

import dbp_kernels as dbp
from dbp_kernels import reference
from dbp_kernels.backends.cuda import gram, library, ops, stats, update
from dbp_kernels.planning.choice import Choice
from dbp_kernels.rules import UpdateRule

_PROBLEM = library.unusable("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_PROBLEM is not None, reason=str(_PROBLEM))]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "shift": gram.patch_gram_shift,
    "box": gram.patch_gram_box,
    "direct": gram.patch_gram_direct,
}
CASES = [
    case(5, 64, (14, 14), 3, padding=1),
    case(3, 100, (9, 11), 3, padding=2, dilation=2),
    case(4, 27, (13,), 5, padding=1),
    case(2, 6, (4, 5, 6), (2, 3, 2), padding=1, groups=2),
    case(4, 3, (32, 30), 7, stride=2, padding=3),
]


def on_device(x: torch.Tensor) -> torch.Tensor:
    """On the GPU with the same strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    flat = x.as_strided((extent,), (1,), x.storage_offset()).cuda()
    return flat.as_strided(x.shape, x.stride())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", CASES, ids=str)
def test_patch_gram(c, form, dtype, poison):
    for layout in LAYOUTS:
        x = c.input(dtype, layout=layout)
        S = FORMS[form](on_device(x), c.geometry)
        assert moment_error(S.cpu(), reference.patch_gram(x.double(), *c.arguments)) < 1e-5, layout
        assert torch.equal(S, S.mT)
        assert torch.equal(S, FORMS[form](on_device(x), c.geometry))  # bit for bit


@pytest.mark.skipif(
    _PROBLEM is not None or torch.cuda.get_device_capability() != (9, 0), reason="not an sm_90"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("c", [*CASES[:4], rows((3000, 200), 2), case(5, 96, (14, 13), 1)], ids=str)
def test_kernels_for_sm90(c, dtype, poison):
    x = c.input(dtype)
    for _ in range(2):
        S = ops.patch_gram(x.cuda(), c.geometry, Choice("cuda_sm90", 0.0, 0.0))
        assert moment_error(S.cpu(), reference.patch_gram(x.double(), *c.arguments)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, poison):
    c = rows((3000, 200), 2)
    x = c.input(dtype)
    S = gram.patch_gram_box(x.cuda(), c.geometry)
    assert moment_error(S.cpu(), reference.patch_gram(x.double(), *c.arguments)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 7, 14])  # D = 27, 63, 126
def test_fused_statistics(channels, dtype, poison):
    c = case(6, channels, (17, 15), 3, padding=1)
    x, R = c.input(dtype), c.R(torch.float32)
    exact = reference.decor_stats(x.double(), R.double(), *c.arguments)
    for result, oracle in zip(stats.decor_stats(x.cuda(), R.cuda(), c.geometry), exact):
        assert error(result.cpu(), oracle) < 1e-5


@pytest.mark.parametrize("dim", [1, 27, 64, 333])
def test_epilogue(dim, poison):
    Z = random((3, 2 * dim, dim))
    S = (Z.mT @ Z / Z.shape[1]).float()
    R = torch.eye(dim) + random((3, dim, dim), torch.float32, 1) / dim
    exact = dbp.rules.update_from_gram(S.double(), R.double(), 0.01, 0.3)
    due = update.gram_update(S.cuda(), R.cuda(), UpdateRule.make("standard", 0.3, dim))
    for result, oracle in zip((due.new(R.cuda(), 0.01), due.loss), exact):
        assert error(result.cpu(), oracle) < 1e-5


def test_kernels_run_on_the_current_stream():
    c = case(8, 32, (20, 20), 3, padding=1)
    x = c.input(torch.bfloat16)
    late = torch.zeros(c.shape, dtype=torch.bfloat16, device="cuda")
    gram.patch_gram_shift(late, c.geometry)  # tables and kernels are loaded
    source = x.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: on another stream the kernels would see zeros
        late.copy_(source)
        S = gram.patch_gram_shift(late, c.geometry)
    torch.cuda.synchronize()
    assert moment_error(S.cpu(), reference.patch_gram(x.double(), *c.arguments)) < 1e-5


def test_capture_into_a_graph():
    c = case(8, 32, (20, 20), 3, padding=1)
    x, R = c.input(torch.bfloat16).cuda(), c.R(torch.float32).cuda()

    def step():
        gram_choice = Choice("gram", 0.0, 0.0, gram=Choice("cuda_shift", 0.0, 0.0))
        return updated(ops, x, R, c.geometry, 1e-3, 0.5, "standard", False, gram_choice)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(c.input(torch.bfloat16, seed=5))
    graph.replay()
    for result, expected in zip(captured, step()):
        assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_on_the_tensors_device():
    c = case(4, 32, (9, 9), 3, padding=1)
    x = c.input(torch.bfloat16)
    with torch.cuda.device(0):
        S = gram.patch_gram_shift(x.to("cuda:1"), c.geometry)
        assert torch.cuda.current_device() == 0
    assert S.device.index == 1
    assert moment_error(S.cpu(), reference.patch_gram(x.double(), *c.arguments)) < 1e-5


def test_an_impossible_launch_is_an_exception_with_the_kernel_and_its_shapes():
    M = torch.zeros(1, 4, 4, device="cuda")
    row = torch.zeros(1, dtype=torch.int32, device="cuda")
    zeros = {"stride_n": 0, "stride": [0] * 3, "step": [1] * 3, "channels": 4, "item_count": 1}
    with pytest.raises(
        RuntimeError, match=r"gram_box failed: invalid argument: x float32\[1, 4, 4\]"
    ):
        library.launch(
            "gram_box", x=M, workspace=M, items=row.repeat(6), boxes=row, **zeros, block=7, dtype=0
        )
    torch.cuda.synchronize()  # nothing is left behind
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    code = """
import torch
from helpers import case
from dbp_kernels.backends.cuda import gram, stats, update
from dbp_kernels.rules import UpdateRule
for c in (case(2, 20, (6, 5), 3, padding=1), case(2, 3, (9, 9), 5, stride=2, padding=2)):
    for dtype in (torch.float32, torch.bfloat16):
        x, R = c.input(dtype).cuda(), c.R(torch.float32).cuda()
        for form in (gram.patch_gram_shift, gram.patch_gram_box, gram.patch_gram_direct):
            rule = UpdateRule.make("standard", 0.5, c.geometry.dim)
            update.gram_update(form(x, c.geometry), R, rule)
        if stats.supported(x, c.geometry):
            stats.decor_stats(x, R, c.geometry)
torch.cuda.synchronize()
"""
    tests = str(Path(__file__).parents[2])
    paths = os.pathsep.join([tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
