"""What the machine can do at best, measured in the same run: matrix products and copies."""

from __future__ import annotations

import torch

from bench.timing import time_once

SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = 2**28  # beyond every cache


def measure(device: torch.device, dtype: torch.dtype) -> dict:
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
