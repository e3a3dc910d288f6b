"""Stands in for ``dbp_kernels.verify.child`` on a machine without a GPU: checks that end as told.

``python verify_child.py BEHAVIOUR``: "right", "wrong" (the second check), "crash", "hang", "full",
"no device", "slow" (hangs the first time only), or "kernels", which runs the real checks on CPU
tensors in the interpreter, "broken kernels" the same with a kernel that forgets the last image.
"""

import os
import sys
import time
from pathlib import Path

from dbp_kernels.verify.workers import serve

BEHAVIOUR = sys.argv[1]
PASSED = {"error": 0.0, "bound": 1e-5}


def run(name: str) -> dict:
    with open(os.environ["RAN"], "a") as file:
        print(name, file=file)
    if not name.startswith("triton second"):
        return PASSED
    if BEHAVIOUR == "wrong":
        return {"status": "failed", "error": 0.5, "bound": 1e-5, "reason": "error 5.00e-01"}
    if BEHAVIOUR == "crash":
        os.abort()
    if BEHAVIOUR == "hang" or (
        BEHAVIOUR == "slow" and not Path(os.environ["RAN"] + "-slow").exists()
    ):
        Path(os.environ["RAN"] + "-slow").touch()
        time.sleep(1000)
    if BEHAVIOUR == "full":
        raise MemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if BEHAVIOUR == "taken":
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    return PASSED


def run_kernel(name: str) -> dict:
    import torch

    from dbp_kernels.backends.triton import gram_shift
    from dbp_kernels.verify import cases

    if BEHAVIOUR == "broken kernels":
        right = gram_shift.patch_gram_shift
        gram_shift.patch_gram_shift = lambda x, *args, **kwargs: right(
            torch.cat([x[:-1], 0 * x[-1:]]), *args, **kwargs
        )
    return cases.run(name, torch.device("cpu"))


def ready() -> None:
    if BEHAVIOUR == "no device":
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")


if "kernels" in BEHAVIOUR:
    os.environ["TRITON_INTERPRET"] = "1"
serve(run_kernel if "kernels" in BEHAVIOUR else run, ready)
