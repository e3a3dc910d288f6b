"""Compiles the CUDA part: csrc/torch and csrc/kernels -> one shared library, with nvcc and ninja.

Used by setup.py; on its own: ``python csrc/build.py [--directory build/cuda] [--in-place]``.
Environment: CUDA_HOME, TORCH_CUDA_ARCH_LIST ("8.0;9.0a;12.0+PTX"), MAX_JOBS, DBP_BUILD_CUDA (0: never,
1: failing to build is an error).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
DIRECTORY = CSRC.parent / "build" / "cuda"  # objects: compiled once, whoever asks
LIBRARY = "libdbp_cuda.so"
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
TORCH_TARGET = "0x020b000000000000ULL"  # the library uses nothing newer than LibTorch 2.11's ABI

# -Xptxas -v: registers, spills and shared memory of each kernel go to the object's log.
_NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
)
_NINJA = """\
ninja_required_version = 1.5
rule kernels
  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out {libraries}
  description = link $out
"""


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), else on PATH, else in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        nvcc = Path(home, "bin", "nvcc")
        if nvcc.is_file():
            return nvcc
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def nvcc_version() -> str:
    """E.g. "13.0"."""
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\d+\.\d+)", text.stdout)[1]


def find_torch() -> Path | None:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_ninja() -> str | None:
    """ninja beside this Python, else on PATH."""
    return shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")


def missing() -> str | None:
    """What the build lacks, in one sentence; None if nothing."""
    if sys.platform != "linux":
        return f"the CUDA kernels are built on Linux only, not on {sys.platform}"
    if find_nvcc() is None:
        return "nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    if find_ninja() is None:
        return "ninja was not found (pip install ninja)"
    torch = find_torch()
    if torch is None:
        return "torch is not visible to the build (install with pip's --no-build-isolation)"
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        return f"the torch in {torch} has no stable ABI headers"
    return None


def wanted() -> bool:
    """Whether to build: DBP_BUILD_CUDA, else whether everything needed is there; says what is not.

    Raises RuntimeError if DBP_BUILD_CUDA=1 and something is missing.
    """
    force = os.environ.get("DBP_BUILD_CUDA", "")
    if force not in ("", "0", "1"):
        raise RuntimeError(f"DBP_BUILD_CUDA={force!r}: expected 0 or 1")
    if force == "0":
        return False
    reason = missing()
    if reason and force == "1":
        raise RuntimeError(f"DBP_BUILD_CUDA=1, but {reason}")
    if reason:
        print(f"dbp-kernels: without the CUDA kernels, as pure Python: {reason}", file=sys.stderr)
    return reason is None


def _entries(architectures: str) -> list[str]:
    return [entry for entry in re.split(r"[;, ]+", architectures) if entry]


def shipped_architectures(known: set[str]) -> str:
    """What of ``ARCHITECTURES`` a compiler has that knows these numbers ("90"), all in CUDA 12.8.

    GPUs newer than the compiler then run the PTX of the newest target without a letter.
    """
    entries = _entries(ARCHITECTURES)
    kept = [e for e in entries if re.sub(r"\D", "", e.removesuffix("+PTX")) in known]
    if kept != entries:
        newest = max(i for i, entry in enumerate(kept) if entry[-1].isdigit())
        kept[newest] += "+PTX"
    return ";".join(kept)


def requested_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, or all that are shipped and nvcc knows."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        return requested
    command = [find_nvcc(), "--list-gpu-code"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return shipped_architectures(set(re.findall(r"sm_(\d+)", listed)))


def gencode_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list like "8.0;9.0a;12.0+PTX" (also with spaces or commas).

    Raises ValueError for an entry of another form, or older than 8.0.
    """
    flags = []
    for entry in _entries(architectures):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None or int(match[1]) < 8:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST entry {entry!r}: expected 8.0 or newer, like 8.6, 9.0a or "
                "12.0+PTX"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError("TORCH_CUDA_ARCH_LIST names no architecture")
    return flags


def kernel_sources() -> list[Path]:
    """The device code, free of torch."""
    return sorted((CSRC / "lib").glob("*.cu"))


def binding_sources() -> list[Path]:
    """The torch ops; no kernels in them, so they are compiled for one architecture."""
    return sorted((CSRC / "torch").glob("*.cu"))


def _escape(text: object) -> str:
    return re.sub(r"([$ :])", r"$\1", str(text))


def write_ninja(directory: Path, architectures: str) -> Path:
    """Writes build.ninja. Returns the library's path."""
    nvcc, torch = find_nvcc(), find_torch()
    gencode = gencode_flags(architectures)
    # file names in error messages say nothing of the machine that compiled them
    folders = (CSRC.parent, torch.parent, torch.resolve().parent)
    names = "-Xcompiler " + ",".join(f"-ffile-prefix-map={folder}/=" for folder in folders)
    kernel_flags = f"{_NVCC_FLAGS} {names} {' '.join(gencode)}"
    targets = " ".join(_entries(architectures))
    binding_flags = (
        f"{_NVCC_FLAGS} {names} {gencode[0]} -DTORCH_TARGET_VERSION={TORCH_TARGET} "
        f"'-DDBP_TARGETS=\"{targets}\"' "
        f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"
    )
    # Linked to torch by name only: at run time it is the torch that Python has imported. The CUDA
    # runtime is linked in statically, so that the file does not ask for one version of it.
    text = _NINJA.format(
        nvcc=nvcc,
        link=f"{nvcc} -shared --no-device-link -cudart static -Xlinker --exclude-libs,ALL",
        libraries=f"-L{torch}/lib -Xlinker --no-as-needed -ltorch -ltorch_cpu",
    )
    objects = []
    for sources, flags in ((kernel_sources(), kernel_flags), (binding_sources(), binding_flags)):
        for source in sources:
            target = f"{source.parent.name}/{source.stem}.o"
            text += f"build {target}: kernels {_escape(source)}\n  flags = {flags}\n"
            objects.append(target)
    text += f"build {LIBRARY}: link {' '.join(objects)}\ndefault {LIBRARY}\n"
    file = directory / "build.ninja"
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)
    return directory / LIBRARY


def build(directory: Path, architectures: str | None = None, jobs: str | None = None) -> Path:
    """Compiles what changed in ``directory``, one process at a time. Returns the library's path.

    Raises RuntimeError if something needed is missing, CalledProcessError if compilation fails.
    """
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    import fcntl  # not on Windows, where setup.py is read too

    architectures = architectures or requested_architectures()
    jobs = jobs or os.environ.get("MAX_JOBS")
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = write_ninja(directory, architectures)
        (directory / "nvcc").write_text(nvcc_version())
        subprocess.run(
            [find_ninja(), "-C", str(directory), *(["-j", jobs] if jobs else [])], check=True
        )
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    parser.add_argument(
        "--in-place", action="store_true", help="put the library into this clone's dbp_kernels too"
    )
    arguments = parser.parse_args()
    library = build(arguments.directory)
    if arguments.in_place:
        library = Path(shutil.copy(library, CSRC.parent / "dbp_kernels" / "backends" / "cuda"))
    print(library)


if __name__ == "__main__":
    main()
