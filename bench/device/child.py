"""``python -m bench.device.child STAGE SETTING``: a worker of a stage, started by ``runner.py``."""

from __future__ import annotations

import sys

from dbp_kernels.verify.workers import serve


def main(name: str, text: str) -> None:
    """Runs the cases it is told of until it dies."""
    from bench.device import faults, groups
    from bench.device.stage import Setting

    stage, setting = groups.find(name), Setting.from_text(text)

    def ready() -> None:
        if not stage.bare:
            import torch

            torch.zeros(1, device=setting.device)  # makes the context

    def run(case: str) -> dict:
        return (faults.run if faults.is_one(case) else stage.run)(case, setting)

    serve(run, ready)


if __name__ == "__main__":
    main(*sys.argv[1:])
