"""One run of a study in a process of its own: ``python -m experiments.worker FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.config import RunConfig
from experiments.records import PLANNED
from experiments.train import run


def main(folder: Path, data_dir: str | None = None) -> None:
    """Trains, or goes on with, what ``planned.json`` says; ``data_dir`` is no part of the protocol."""
    config = RunConfig().override(json.loads((folder / PLANNED).read_text())["config"])
    if data_dir is not None:
        config = config.override({"data.dir": data_dir})
    run(config, folder, resume=True, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
