"""A GPU or a driver that the compiled library is not for: said clearly, nothing launched, nothing left.

The library's own objects, linked with a CUDA runtime that has no device (stub/).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_library import directory, script, targets
from emulation import CSRC

HERE = Path(__file__).parent
NO_CODE = 209  # cudaErrorNoKernelImageForDevice
KERNELS = ["gram_shift_sm90", "gram_matrix_sm90", "gram_shift", "pack"]

_ASK = """
import ctypes, json, sys, torch
torch.ops.load_library(sys.argv[1])
stub = ctypes.CDLL(sys.argv[1])
answers = []
for device, kernels in json.loads(sys.argv[2]):
    stub.stub_device(*device)
    answer = {"problem": torch.ops.dbp_cuda.device_problem(0)}
    for kernel in kernels:
        before = stub.stub_launches(), stub.stub_looked_up()
        code = getattr(stub, "launch_" + kernel)()
        after = stub.stub_launches(), stub.stub_looked_up()
        answer[kernel] = [code, *(a - b for a, b in zip(after, before)), stub.stub_last_error()]
    answers.append(answer)
print(json.dumps(answers))
"""


def run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory) -> Path:
    """The library with the stub in the CUDA runtime's place."""
    built, build = directory(), script("build")
    nvcc, torch = build.find_nvcc(), build.find_torch()
    folder = tmp_path_factory.mktemp("stub")
    options = ("-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", f"-I{CSRC}")
    for source in (HERE / "stub" / "launches.cu", HERE / "stub" / "runtime.cpp"):
        hidden = "-Xcompiler=-fPIC,-fvisibility=hidden"
        run(nvcc, *options, hidden, "-c", source, "-o", folder / f"{source.stem}.o")
    objects = (*folder.glob("*.o"), *built.glob("lib/*.o"), *built.glob("torch/*.o"))
    libraries = f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"
    run(nvcc, "-shared", "-cudart", "none", *objects, "-o", folder / "stubbed.so", *libraries)
    return folder / "stubbed.so"


def ask(stubbed: Path, *questions) -> list[dict]:
    """What the library says of devices and what its launchers do there.

    A question is ((CUDA version of the driver, major and minor capability, threads that a block of
    the sm_90a kernels may have, whether there is code), kernels). Answers: the problem, and per kernel
    the launcher's error, launches, look-ups of its attributes, the error left behind.
    """
    return json.loads(run(sys.executable, "-c", _ASK, stubbed, json.dumps(questions)))


def current() -> int:
    """CUDA's number of a driver new enough for this library."""
    return 1000 * int(script("build").nvcc_version().split(".")[0]) + 990


@pytest.mark.aot
@pytest.mark.slow
def test_a_kernel_for_sm90_is_not_launched_elsewhere(stubbed):
    sm90 = KERNELS[:2]
    ampere, blackwell, plain, hopper = ask(
        stubbed,
        ((current(), 8, 0, 1024, 1), sm90),
        ((current(), 10, 0, 1024, 1), sm90),
        ((current(), 9, 0, 32, 1), sm90),  # built for 9.0 without the a
        ((current(), 9, 0, 1024, 1), [*sm90, *sm90]),
    )
    for kernel in sm90:
        assert ampere[kernel] == blackwell[kernel] == [NO_CODE, 0, 0, 0]
        assert plain[kernel] == [NO_CODE, 0, 1, 0]
        assert hopper[kernel] == [0, 1, 0, 0]  # the second time no attributes are asked for
    assert hopper["problem"] == ""


@pytest.mark.aot
@pytest.mark.slow
def test_without_code_for_the_gpu_every_launcher_says_so(stubbed):
    old, hopper = ask(
        stubbed,
        ((current(), 7, 5, 1024, 0), KERNELS),
        ((current(), 9, 0, 1024, 0), KERNELS[:2]),
    )
    for kernel in KERNELS[:2]:
        assert hopper[kernel] == [NO_CODE, 0, 1, 0]
    for kernel in KERNELS:
        code, _, _, left = old[kernel]
        assert (code, left) == (NO_CODE, 0), kernel
    assert re.fullmatch(
        r"cuda:0 has compute capability 7\.5, expected that of one of the library's targets; the "
        rf"library was built for {re.escape(targets().replace(';', ' '))}",
        old["problem"],
    )


@pytest.mark.aot
@pytest.mark.slow
def test_a_driver_that_is_too_old_is_named(stubbed):
    version = script("build").nvcc_version()
    needs = {"12": 525, "13": 580}[version.split(".")[0]]
    built = f"the library was built by CUDA {version} and needs driver {needs} or later"
    none, old = ask(stubbed, ((0, 8, 0, 1024, 1), []), ((11080, 8, 0, 1024, 1), []))
    assert none["problem"] == f"there is no NVIDIA driver, {built}"
    assert old["problem"] == f"the driver supports CUDA 11.8, {built}"


@pytest.mark.aot
@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize(("target", "fits"), [("compute_90", False), ("compute_90a", True)])
def test_launch_bounds_keep_blocks_from_code_that_traps(kernel, target, fits, tmp_path):
    build = script("build")
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    ptx, options = tmp_path / "kernel.ptx", ("-std=c++17", "--expt-relaxed-constexpr")
    run(
        build.find_nvcc(), *options, "-ptx", f"-arch={target}", CSRC / f"lib/{kernel}.cu", "-o", ptx
    )
    bounds = {int(n) for n in re.findall(r"\.maxntid (\d+)", ptx.read_text())}
    threads = {"gram_shift_sm90": 384, "gram_matrix_sm90": 288}[kernel]  # of their blocks
    assert bounds == ({threads} if fits else {32})
