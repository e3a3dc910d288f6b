"""``python -m dbp_kernels.verify.child --device cuda:0``: runs checks it is told by name, until it dies."""

from __future__ import annotations

import argparse
from typing import Any


def main() -> None:
    """Serves the checks of ``cases.py``; errors of a broken device end the process, not the caller."""
    from dbp_kernels.verify.workers import serve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    name = parser.parse_args().device

    def ready() -> None:  # importing torch and making a context count as start-up
        import torch

        from dbp_kernels.verify import cases  # noqa: F401

        torch.cuda.set_device(name)  # of which it is asked whether kernels are usable
        torch.zeros(1, device=name)

    def run(case: str) -> dict[str, Any]:
        import torch

        from dbp_kernels.verify import cases

        return cases.run(case, torch.device(name))

    serve(run, ready)


if __name__ == "__main__":
    main()
