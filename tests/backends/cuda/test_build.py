"""The build of the CUDA part: what it needs, what it makes, and that one wheel serves all."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_library import ROOT, directory, library, script, targets

build = script("build")
resources = script("resources")


def run(*command, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


# --------------------------------------------------------------------------- settings


def test_architecture_list():
    flags = build.gencode_flags("8.0; 9.0a,12.0+PTX")
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    shipped = {flag.split("code=")[-1] for flag in build.gencode_flags(build.ARCHITECTURES)}
    assert shipped == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"}


def test_an_older_compiler_leaves_newer_gpus_its_ptx():
    known = {"75", "80", "86", "87", "89", "90"}  # CUDA 12.0 to 12.6
    assert build.shipped_architectures(known) == "8.0;8.6;8.9+PTX;9.0a"
    assert build.shipped_architectures(known | {"100", "120"}) == build.ARCHITECTURES
    assert set(build._entries(build.requested_architectures()))  # of the compiler that is here


@pytest.mark.parametrize("bad", ["Hopper", "7.5", "8", "9.0b", ";"])
def test_bad_architectures_are_refused(bad):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        build.gencode_flags(bad)


def _nvcc_in(folder: Path) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_found_in_cuda_home_first_then_on_path(tmp_path, monkeypatch):
    home, path = _nvcc_in(tmp_path / "home"), _nvcc_in(tmp_path / "path")
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("CUDA_HOME", str(home.parent.parent))
    assert build.find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert build.find_nvcc() == path


@pytest.mark.parametrize("lacking", ["find_nvcc", "find_ninja", "find_torch"])
def test_without_its_tools_the_package_is_pure_python_and_says_so(lacking, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/bin/nvcc"))
    monkeypatch.setattr(build, "find_ninja", lambda: "/bin/ninja")
    monkeypatch.setattr(build, lacking, lambda: None)
    monkeypatch.delenv("DBP_BUILD_CUDA", raising=False)
    assert not build.wanted()
    said = capsys.readouterr().err
    assert "pure Python" in said
    assert lacking.removeprefix("find_") in said
    monkeypatch.setenv("DBP_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match=lacking.removeprefix("find_")):
        build.wanted()
    monkeypatch.setenv("DBP_BUILD_CUDA", "yes")
    with pytest.raises(RuntimeError, match="expected 0 or 1"):
        build.wanted()


def test_zero_never_builds(monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: None)
    monkeypatch.delenv("DBP_BUILD_CUDA", raising=False)
    assert build.wanted()
    monkeypatch.setenv("DBP_BUILD_CUDA", "0")
    assert not build.wanted()


# --------------------------------------------------------------------------- the library


@pytest.mark.aot
def test_library_asks_for_no_python_and_no_cuda_library():
    symbols = run("nm", "-D", "--undefined-only", library()).stdout.split()
    assert "torch_library_impl" in symbols  # the list is there
    assert not [s for s in symbols if re.match(r"_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]", s)]
    needed = run("readelf", "-d", library()).stdout
    assert "libtorch_cpu" in needed
    assert "libpython" not in needed
    assert "libcuda" not in needed
    assert "PATH" not in needed  # no folder of the machine that built it
    # C++ of torch's own would tie it to one torch: only the stable C functions
    assert not [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10"))]


@pytest.mark.aot
def test_library_loads_without_cuda_and_says_why_it_cannot_run():
    code = f"""
import json, torch
torch.ops.load_library({str(library())!r})
print(json.dumps([torch.ops.dbp_cuda.build(), torch.ops.dbp_cuda.device_problem(99)]))
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    text, problem = json.loads(done.stdout)
    assert re.fullmatch(r"dbp_cuda build: nvcc \d+\.\d+, targets .*", text)
    assert text.endswith(targets().replace(";", " "))
    assert problem  # there is no device of this number


@pytest.mark.aot
@pytest.mark.slow
def test_cuda_12_builds_the_library_too(tmp_path):
    """By the toolkit in DBP_CUDA12_HOME, e.g. one made by csrc/cuda12.sh."""
    home = os.environ.get("DBP_CUDA12_HOME")
    if home is None:
        pytest.skip("DBP_CUDA12_HOME names no CUDA 12 toolkit")
    settings = {"CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": "8.9+PTX;9.0a", "MAX_JOBS": "2"}
    done = run(sys.executable, ROOT / "csrc/build.py", "--directory", tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    code = f"""
import json, torch
torch.ops.load_library({str(tmp_path / build.LIBRARY)!r})
print(json.dumps([torch.ops.dbp_cuda.build(), torch.ops.dbp_cuda.device_problem(99)]))
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    text, problem = json.loads(done.stdout)
    assert re.fullmatch(r"dbp_cuda build: nvcc 12\.\d+, targets 8\.9\+PTX 9\.0a", text)
    if "no NVIDIA driver" in problem:
        assert problem.endswith("needs driver 525 or later")
    # no spills, and tensor cores where they belong; registers are compared for one compiler only
    limits, _ = resources.read_limits(ROOT / "tests" / "backends" / "cuda" / "limits.json")
    assert resources.violations(resources.report(tmp_path), limits, same_compiler=False) == []


# --------------------------------------------------------------------------- resources


@pytest.mark.aot
def test_resources_are_within_the_committed_limits():
    """For the targets these tests have built; after ``make cuda`` for all of them."""
    if resources.find_cuobjdump() is None:
        pytest.skip("no cuobjdump")
    found = resources.report(directory())
    reported = {target for by_target in found.values() for target in by_target}
    flags = " ".join(build.gencode_flags(targets()))
    assert reported == set(re.findall(r"code=(sm_\w+)", flags))
    limits, nvcc = resources.read_limits(ROOT / "tests" / "backends" / "cuda" / "limits.json")
    assert resources.violations(found, limits, nvcc == resources.compiler(directory())) == []
    for by_target in limits.values():
        for limit in by_target.values():
            assert limit.spilled == 0  # no configuration that spills is shipped
    for kernel, by_target in limits.items():
        if not kernel.startswith("gram_"):
            continue
        for target, limit in by_target.items():
            if "sm90" in kernel:  # empty elsewhere
                assert limit.tensor == ("HGMMA" if target == "sm_90a" else "")
            else:  # every product but that of ieee fp32
                assert limit.tensor == ("" if "fp32" in kernel else "HMMA"), kernel


def test_what_passes_a_limit_is_named():
    limit = resources.Resources(registers=128, stack=0, spilled=0, shared=1024, tensor="HMMA")
    limits = {"gram": {"sm_80": limit}}

    def problems(**change):
        return resources.violations({"gram": {"sm_80": replace(limit, **change)}}, limits)

    assert problems() == []
    assert problems(registers=120, shared=0) == []
    for name, change in (
        ("registers", {"registers": 129}),
        ("spilled", {"spilled": 4}),
        ("stack", {"stack": 8}),
        ("shared memory", {"shared": 1025}),
        ("tensor cores", {"tensor": ""}),
    ):
        (problem,) = problems(**change)
        assert problem.startswith("gram on sm_80: ")
        assert name in problem
    other = {"gram": {"sm_80": replace(limit, registers=140)}}
    assert resources.violations(other, limits, same_compiler=False) == []
    assert "no committed limit" in resources.violations({"new": {"sm_80": limit}}, {})[0]
    assert "no such kernel" in resources.violations({}, limits)[0]


@pytest.mark.aot
def test_report_sees_spills_and_tensor_cores(tmp_path):
    """Of a kernel made to spill, and of one that multiplies on tensor cores."""
    nvcc = build.find_nvcc()
    if nvcc is None or resources.find_cuobjdump() is None:
        pytest.skip("no nvcc or no cuobjdump")
    source = tmp_path / "lib" / "bad.cu"
    source.parent.mkdir()
    source.write_text("""
__global__ void __launch_bounds__(1024) spill_kernel(float* x, int n) {
  __shared__ float tile[256];
  tile[threadIdx.x % 256] = x[threadIdx.x];
  __syncthreads();
  float v[96] = {};
  for (int t = 0; t < n; ++t) {
    const float a = x[t];
    #pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = v[i] * a + tile[(threadIdx.x + i) % 256];
  }
  #pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
__global__ void mma_kernel(float* c, const unsigned* a) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
}
""")
    target = source.with_suffix(".o")
    done = run(nvcc, "-arch=sm_80", "-Xptxas", "-v", "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    target.with_suffix(".o.log").write_text(done.stderr)
    found = {name: by_target["sm_80"] for name, by_target in resources.report(tmp_path).items()}
    assert found.keys() == {"spill_kernel", "mma_kernel"}
    assert found["spill_kernel"].spilled > 0
    assert found["spill_kernel"].shared == 1024
    assert found["spill_kernel"].tensor == ""
    assert found["mma_kernel"].spilled == 0
    assert found["mma_kernel"].tensor == "HMMA"


# --------------------------------------------------------------------------- the wheel

_IN_A_FRESH_ENVIRONMENT = """
import json, sys, torch
import dbp_kernels as dbp
from dbp_kernels import info
from dbp_kernels.backends.cuda import library
assert dbp.__file__.startswith(sys.prefix), dbp.__file__
report = info.environment()
assert report["compiled parts"].startswith("cuda kernels, nvcc "), report["compiled parts"]
assert report["backends"]["cpu"]["cuda"] == "the cuda backend runs on CUDA tensors, not on cpu"
assert not hasattr(torch.ops.dbp_cuda, "build")  # not loaded where there is no CUDA device
assert torch.cuda.is_available() or "none is available" in library.unusable("cuda")
assert library.load() is None  # but it could be
x = torch.randn(2, 3, 6, 5)
R = torch.eye(27) + 0.1 * torch.randn(27, 27)
window = [3, 3], [1, 1], [1, 1], [1, 1], 1
weight = torch.randn(4, 3, 3, 3)
for name, arguments in {
    "patch_gram": (x, *window),
    "patch_mean": (x, *window),
    "decor_stats": (x, R, *window),
    "decor_update": (x, R, *window, 1e-3, 0.5),
    "decorrelate": (x, R, *window),
    "decor_conv2d": (x, weight, R, None, *window[1:]),
}.items():
    result = torch.library.opcheck(getattr(torch.ops.dbp, name).default, arguments)
    assert set(result.values()) == {"SUCCESS"}, (name, result)
print(json.dumps(report["compiled parts"]))
"""


@pytest.mark.aot
@pytest.mark.slow
def test_wheel_in_a_fresh_environment(tmp_path):
    """Built as a user builds it, installed beside a torch, with everything asked of it there."""
    reason = build.missing()
    if reason:
        pytest.skip(reason)
    source = tmp_path / "source"
    for name in ("dbp_kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    settings = {"DBP_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": "2"}
    done = run(*pip, "-w", tmp_path, source, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)  # any Python from 3.10 on
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == [f"dbp_kernels/backends/cuda/{build.LIBRARY}"]

    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", venv).returncode == 0
    python = venv / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).stdout.strip()
    # this environment's torch, behind what the wheel installed
    Path(site, "torch.pth").write_text(sysconfig.get_path("purelib"))
    done = run(python, "-c", _IN_A_FRESH_ENVIRONMENT, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cuda kernels, nvcc \d+\.\d+, targets 9\.0a", json.loads(done.stdout))


# --------------------------------------------------------------------------- CMake


@pytest.mark.aot
@pytest.mark.slow
def test_cmake_package_and_the_example_that_uses_it(tmp_path):
    """Configured, built and installed; the example then finds the package where it was installed."""
    cmake = shutil.which("cmake")
    if cmake is None or build.missing():
        pytest.skip("no cmake" if cmake is None else build.missing())
    ninja = f"-DCMAKE_MAKE_PROGRAM={build.find_ninja()}"
    settings = ("-G", "Ninja", ninja, "-DCMAKE_CUDA_ARCHITECTURES=80", "-DCMAKE_BUILD_TYPE=Release")
    nvcc = f"-DCMAKE_CUDA_COMPILER={build.find_nvcc()}"
    python = f"-DPython_EXECUTABLE={sys.executable}"

    def cmake_run(*arguments):
        done = run(cmake, *arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    prefix = tmp_path / "prefix"
    options = (f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DDBP_TORCH=ON", python, nvcc)
    cmake_run("-S", ROOT, "-B", tmp_path / "build", *settings, *options)
    cmake_run("--build", tmp_path / "build", "--parallel", "2")
    cmake_run("--install", tmp_path / "build")
    example = ("-S", ROOT / "examples" / "cpp", "-B", tmp_path / "example")
    cmake_run(*example, *settings, nvcc, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake_run("--build", tmp_path / "example")
    done = run(tmp_path / "example" / "decor_stats")
    if "cuda:0" in run(sys.executable, "-m", "dbp_kernels", "info").stdout:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("device 0: ")
    (library_file,) = prefix.glob("lib*/libdbp_cuda.so")
    code = f"import torch; torch.ops.load_library({str(library_file)!r}); torch.ops.dbp_cuda.pack"
    assert run(sys.executable, "-c", code).returncode == 0
