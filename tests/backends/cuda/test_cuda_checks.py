"""The checks of the CUDA kernels, emulated: all pass, every tile is there, a fault is seen."""

import re
from pathlib import Path

import pytest
import torch
from stand_in import emulated

from dbp_kernels.backends.cuda import gram, library, shift_plan
from dbp_kernels.verify import checks, cuda_checks

pytestmark = pytest.mark.emulation
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def built_for_hopper(monkeypatch):
    monkeypatch.setattr(library, "build_text", lambda: "nvcc 13.0, targets 8.0 9.0a")


def planned(capability=90):
    return list(cuda_checks.checks("planned", capability))


@pytest.mark.parametrize(
    "kernel", ["gram_shift", "gram_box", "gram_direct", "stats", "update", "pack"]
)
def test_every_check_passes(kernel):
    chosen = [check for check in planned() if check.kernel == kernel]
    assert chosen
    for check in chosen:
        with emulated() as launched:
            assert checks.run(check, CPU)["status"] == "passed", check.name
        assert kernel in launched


@pytest.mark.parametrize("kernel", ["gram_shift_sm90", "gram_matrix_sm90"])
def test_kernels_for_sm90_are_checked_on_that_capability_only(kernel):
    # the second of each is larger: minutes in emulation
    small = [check for check in planned() if check.kernel == kernel][::2]
    assert {check.precision for check in small} == {"bf16", "fp16"}
    for check in small:
        with emulated() as launched:
            assert checks.run(check, CPU)["status"] == "passed", check.name
        assert kernel in launched
    assert kernel not in {check.kernel for check in planned(80)}


def test_every_tile_is_checked_in_every_precision():
    tiles = {(check.kernel, check.configuration, check.precision) for check in planned()}
    for precision in checks.DTYPES.keys() - {"tf32x3"}:  # which only Triton's kernels have
        for kernel, blocks in (
            ("gram_shift", shift_plan.BLOCKS),
            ("gram_box", gram.BLOCKS),
            ("gram_direct", gram.BLOCKS),
        ):
            for block in blocks:
                assert (kernel, f"tiles of {block}", precision) in tiles


def test_every_kernel_of_the_library_is_checked():
    header = Path(__file__).resolve().parents[3] / "csrc/lib/kernels.h"
    kernels = set(re.findall(r"cudaError_t (\w+)\(const", header.read_text()))
    assert len(kernels) > 5
    # the reduction has no check of its own: every second moment ends in it
    assert kernels == {check.kernel for check in planned()} | {"reduce"}


def test_a_kernel_that_does_nothing_fails():
    check = next(check for check in planned() if check.kernel == "gram_shift")
    library.simulate(lambda kernel, arguments: None)
    try:
        record = checks.run(check, CPU)
    finally:
        library.simulate(None)
    assert record["status"] == "failed"
    assert record["error"] == float("inf")  # what nobody wrote is NaN
