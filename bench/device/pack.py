"""``python -m bench device-check --pack DIR``: the folder that travels to a machine without network.

It holds the wheel of this clone, with the CUDA library where nvcc is at hand; bench, tests and
experiments, but no package beside them, so that what runs is what was built; CIFAR-10 where a folder
of it is named; what ``runs`` has of the study of group "train", which then goes on; small pure wheels
that the machine may lack; ``packed.json`` and ``run.sh``, which needs nothing but Python with torch
and pip.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.core import machine
from bench.device.train import STUDY

LIMIT = 60e6  # bytes in all
SOURCES = ("bench", "tests", "experiments", "examples", "csrc", "pyproject.toml")
NOT_PACKED = ("__pycache__", "*.py[cod]", "*.so", "*.o", "*.png", "*.pt", "events.out.*")
PYTHON = "3.12"  # of the machines it goes to
SPARE = (
    *("pytest", "iniconfig", "pluggy", "packaging", "pygments", "pytest-xdist", "execnet"),
    *("hypothesis", "sortedcontainers", "expecttest", "tqdm", "nvidia-ml-py"),
)
RUN = "run.sh"


class PackError(Exception):
    """The folder cannot be made; says why."""


def pack(folder: Path, *, data: Path | None = None, download: bool = True) -> dict:
    """Makes ``folder``, which must not exist or be empty. Returns its manifest.

    ``data`` holds CIFAR-10's parquet files, as for ``python -m experiments``; without ``download``
    there are no spare wheels. Raises PackError, and leaves nothing, if the folder holds something,
    the wheel cannot be built, data are not found or all of it is larger than ``LIMIT``.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PackError(f"{folder} is not an empty folder, and nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        manifest = _fill(made, data, download)
        _check_size(made)
        made.replace(folder)
    return manifest


def _fill(folder: Path, data: Path | None, download: bool) -> dict:
    for name in SOURCES:
        _copy(machine.ROOT / name, folder / name)
    _copy(Path(__file__).with_name(RUN), folder / RUN)
    earlier = Path("runs", STUDY)
    if (machine.ROOT / earlier).is_dir():
        _copy(machine.ROOT / earlier, folder / earlier)
    if data is not None:
        _copy_data(data, folder / "data" / "cifar10")
    wheel = _build_wheel(folder / "wheels")
    spare = _download(folder / "wheels" / "spare") if download else []
    manifest = {
        "format": 1,
        "packed": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "dirty": machine.dirty(),
        "wheel": wheel.name,
        "cuda": _cuda(wheel),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spare": spare,
        "data": data is not None,
        "bytes": sizes(folder),
    }
    (folder / machine.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_PACKED))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _copy_data(source: Path, target: Path) -> None:
    from experiments.data import find_parquet

    for split in ("train", "test"):
        try:
            files = find_parquet("cifar10", source, split)
        except FileNotFoundError as error:
            raise PackError(str(error)) from None
        for file in files:
            _copy(file, target / file.name)


def _build_wheel(folder: Path) -> Path:
    """The wheel of this clone. Says loudly if it has no CUDA library."""
    print("building the wheel; compiling the CUDA kernels for the first time takes minutes")
    with tempfile.TemporaryDirectory() as temporary:
        # What earlier builds left in build/lib would be packed too: this build has one of its own.
        # nvcc's objects stay where they are.
        settings = Path(temporary) / "setup.cfg"
        settings.write_text(f"[build]\nbuild_base = {temporary}/build\n")
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
        done = subprocess.run(
            [*command, "--no-cache-dir", "-w", folder, machine.ROOT],
            env={**os.environ, "DIST_EXTRA_CONFIG": str(settings)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode:
        raise PackError(f"the wheel cannot be built:\n{done.stdout[-3000:]}")
    (wheel,) = folder.glob("*.whl")
    if _cuda(wheel) is None:
        why = re.search(r"^\s*(dbp-kernels: without .*)$", done.stdout, re.MULTILINE)
        reason = why[1] if why else "DBP_BUILD_CUDA=0"
        print(f"WARNING: NO CUDA KERNELS IN THIS WHEEL: {reason}", file=sys.stderr)
    return wheel


def _cuda(wheel: Path) -> str | None:
    """What the wheel's CUDA library says of its compiler and targets; None: it has none."""
    with zipfile.ZipFile(wheel) as content:
        libraries = [name for name in content.namelist() if name.endswith("/libdbp_cuda.so")]
        if not libraries:
            return None
        return re.search(rb"dbp_cuda build: ([^\0]+)\0", content.read(libraries[0]))[1].decode()


def _download(folder: Path) -> list[str]:
    """The spare wheels that the index has as pure ones; says which are missing. Returns their names."""
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pure = ["--python-version", PYTHON, "--implementation", "py", "--abi", "none"]
    where = ["--platform", "any", "--retries", "0", "--timeout", "10", "-d", str(folder)]
    missing = [
        name
        for name in SPARE
        if subprocess.run([*pip, *pure, *where, name], capture_output=True).returncode
    ]
    if missing:
        print(f"not downloaded, the machine must have them: {', '.join(missing)}", file=sys.stderr)
    return sorted(wheel.name for wheel in folder.iterdir())


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of everything in a folder by its first name, largest first."""
    total: dict[str, int] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            part = file.relative_to(folder).parts[0]
            total[part] = total.get(part, 0) + file.stat().st_size
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _check_size(folder: Path) -> None:
    files = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    total = sum(files.values())
    if total <= LIMIT:
        return
    largest = sorted(files, key=files.__getitem__, reverse=True)[:5]
    named = ", ".join(f"{f.relative_to(folder)} {files[f] / 1e6:.1f} MB" for f in largest)
    raise PackError(
        f"the folder would hold {total / 1e6:.1f} MB, more than {LIMIT / 1e6:.1f} MB; largest: "
        f"{named}. TORCH_CUDA_ARCH_LIST can name fewer GPUs to compile for"
    )


def main(folder: Path, data: Path | None, download: bool) -> int:
    """``pack`` for a command line: prints what came of it; returns the exit status."""
    try:
        manifest = pack(folder, data=data, download=download)
    except PackError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(manifest["bytes"].values())
    print(f"{manifest['wheel']}: {manifest['cuda'] or 'no CUDA kernels'}")
    print(f"{folder}: {total / 1e6:.1f} MB; run there: ./{RUN} first|rest|train|all")
    return 0
