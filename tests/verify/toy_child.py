"""A child whose cases go wrong in every way; started by test_workers.py, which names them."""

import ctypes
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

# by its path: the package would import torch, and these children are started by the dozen
spec = importlib.util.spec_from_file_location("workers", os.environ["TOY_WORKERS"])
workers = importlib.util.module_from_spec(spec)
sys.modules["workers"] = workers
spec.loader.exec_module(workers)

CHANNEL = int(os.environ[workers._CHANNEL])


def hang_for_good() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def half_a_line() -> None:
    os.write(CHANNEL, b'{"case": "half", "status": "pas')
    os._exit(0)


def chatter() -> dict:
    print('{"case": "chatter", "status": "failed"}')
    os.system("echo from a shell")  # as C code writes, past sys.stdout
    os.write(1, b"\xff\xfe no text\n")
    os.write(CHANNEL, b"no JSON\n[1]\n")
    return {"seen": 1}


def grow() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
    bytearray(2**30)


def leave_a_process() -> None:
    path = Path(os.environ["TOY_FOLDER"]) / "left"
    command = "import time; time.sleep(600)"
    path.write_text(str(subprocess.Popen([sys.executable, "-c", command]).pid))
    os._exit(3)


def raise_(error: BaseException) -> None:
    raise error


CASES = {
    "pass": lambda: {"kernel": "k"},
    "fail": lambda: {"status": "failed", "error": 2.0, "bound": 1.0},
    "raise": lambda: raise_(ValueError("wrong\nin two lines")),
    "exit": lambda: sys.exit(0),
    "none": lambda: None,
    "memory": lambda: raise_(MemoryError()),
    "cuda memory": lambda: raise_(RuntimeError("Triton Error [CUDA]: out of memory")),
    "grow": grow,
    "broken": lambda: raise_(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "pid": lambda: {"pid": os.getpid()},
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "silent": lambda: os._exit(0),
    "half": half_a_line,
    "chatter": chatter,
    "hang": lambda: time.sleep(600),
    "stubborn": hang_for_good,
    "left": leave_a_process,
    "slow": lambda: time.sleep(0.3) or {},
    "last words": lambda: print("about to die", file=sys.stderr, flush=True) or os.abort(),
}


def run(name: str) -> dict:
    return CASES[name.split("#")[0]]()


if __name__ == "__main__":
    with open(Path(os.environ["TOY_FOLDER"]) / "starts", "a") as file:
        file.write(f"{os.getpid()}\n")
    how = sys.argv[1] if len(sys.argv) > 1 else ""
    if how == "unstartable":
        sys.exit("no device here")
    if how == "endless start":
        time.sleep(600)
    if how == "slow start":
        time.sleep(1.5)
    workers.serve(run)
