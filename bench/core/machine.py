"""Where and with what a result was measured, and what the machine can do at best, in the same run."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from dbp_kernels.planning.calibration import cpu_name
from dbp_kernels.tools import origin
from dbp_kernels.tools.timing import time_once

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "packed.json"  # of a packed folder, which is no clone: says what it was made from


def _packed() -> dict | None:
    try:
        return json.loads((ROOT / MANIFEST).read_text())
    except FileNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the clone, or of the packed folder; None outside of one."""
    packed = _packed()
    return packed["commit"] if packed else origin.commit(ROOT)


def dirty() -> bool | None:
    """Whether the code that a benchmark runs differs from the commit."""
    packed = _packed()
    if packed:
        return packed["dirty"]
    return origin.dirty(ROOT)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache: a GPU's L2, a CPU's L3 (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return 2**25


def describe(device: torch.device | str) -> dict[str, object]:
    """Versions, processor, threads and commit, for a result file."""
    device = torch.device(device)
    info: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkl": torch.backends.mkl.is_available(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
        "dirty": dirty(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
        info["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        info["cuda"] = torch.version.cuda
        info["cudnn"] = torch.backends.cudnn.version()
    return info


SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = 2**28  # beyond every cache


def peaks(device: torch.device, dtype: torch.dtype) -> dict:
    """{"gemm_tflops", "copy_gbytes"}: a large square product and a large copy, best of some."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    gemm = _best(lambda: a @ b, device)
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gemm_tflops": float(f"{2 * side**3 / gemm / 1e12:.4g}"),
        "copy_gbytes": float(f"{2 * source.numel() * 4 / copy / 1e9:.4g}"),
    }


def _best(call, device: torch.device) -> float:
    call()
    return min(time_once(call, device, calls=3) for _ in range(5))


def add_fractions(record: dict, peaks: dict) -> None:
    """Adds rates, and their fractions of what the machine can do, to every timed method.

    Useful are the operations that the shift structure cannot avoid, and the bytes of the input read
    once and of S written once, whatever a method did.
    """
    gflop, moved = record.get("useful_gflop"), record.get("useful_bytes")
    for method in record["methods"].values():
        if "seconds" not in method:
            continue
        seconds = method.get("replay", method["seconds"])["median"]
        if gflop:
            rate = gflop / 1e3 / seconds
            method["useful_tflops"] = float(f"{rate:.4g}")
            method["of_peak"] = float(f"{rate / peaks['gemm_tflops']:.3g}")
        if moved:
            method["of_copy"] = float(f"{moved / 1e9 / seconds / peaks['copy_gbytes']:.3g}")
