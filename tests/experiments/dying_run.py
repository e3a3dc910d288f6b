"""A run that is killed at its so-manieth write: ``dying_run.py CONFIG.yaml OUT WRITES``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.train import run

replace = os.replace
left = int(sys.argv[3])


def dying(a: Any, b: Any) -> None:
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)


os.replace = dying
run(RunConfig.from_yaml(sys.argv[1]), Path(sys.argv[2]), resume=True, progress=False)
