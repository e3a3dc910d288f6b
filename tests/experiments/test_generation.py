"""experiments/generation: a run of a VAE on the digits, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config import RunConfig
from experiments.generation import Generation
from experiments.metrics import read
from experiments.models import negative_elbo
from experiments.train import run

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

BASE: dict[str, Any] = {
    "task": "experiments.generation:Generation",
    "epochs": 10,
    "threads": 1,
    "data": {"train_size": 300, "test_size": 100, "options": {"normalise": False}},
    "model": {"name": "vae", "options": {"widths": [8, 16], "latent": 4}},
    "optimizer": {"name": "adam", "lr": 1e-2},
}


@pytest.mark.parametrize("decor", [None, {"lr": 1e-3}])
def test_a_vae_learns(tmp_path: Path, decor: dict[str, Any] | None) -> None:
    config = RunConfig.from_dict({**BASE, "decor": decor})
    assert run(config, tmp_path / "run", progress=False)["status"] == "finished"
    rows = read(tmp_path / "run" / "metrics.csv")
    assert rows[-1].validation_loss < 0.9 * rows[0].validation_loss
    for row in rows:
        assert row.test_score == -row.test_loss
        # In nats of 64 pixels: a coin for each pixel has 44.
        assert 10 < row.test_loss < 60


def test_evaluation_is_the_bound_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    task = Generation(RunConfig.from_dict(BASE), torch.device("cpu"))
    before = torch.get_rng_state()
    task.model.eval()
    with torch.no_grad():
        loss, score = task.evaluate("test")
        assert (loss, score) == task.evaluate("test")
        assert torch.equal(torch.get_rng_state(), before)
        # One draw for each image is an estimate of the same.
        task.model.train()
        x = task.data.test.x
        drawn = torch.stack([negative_elbo(*task.model(x), x) for _ in range(30)])
    assert abs(drawn.mean().item() - loss) < 5 * drawn.std().item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, r"data\.options\.normalise is not given or true"),
        ({"options": {"label_smoothing": 0.1}}, r"options has \['label_smoothing'\]"),
        ({"model": {"name": "mlp"}}, r"model\.name is 'mlp': expected vae"),
    ],
)
def test_what_makes_no_sense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(RunConfig.from_dict({**BASE, **changes}), torch.device("cpu"))
