"""Decorrelation of whole feature maps: the network it makes, and a run with it."""

import json

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from experiments import feature_maps
from experiments.config import RunConfig
from experiments.models import build_model
from experiments.train import Trainer, run


def test_the_network_is_convnet_with_an_R_of_each_layers_input():
    torch.manual_seed(0)
    model = feature_maps.convnet((1, 8, 8), 10, widths=[4, 6], batch_norm=True)
    torch.manual_seed(0)
    plain = build_model("convnet", (1, 8, 8), 10, widths=[4, 6], batch_norm=True)
    sizes = [m.num_features for m in model.modules() if isinstance(m, dbp.nn.Decorrelate)]
    assert sizes == [64, 4 * 4 * 4, 6 * 2 * 2]
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x), plain(x))


def test_a_run_learns_R_and_tells_its_memory(tmp_path):
    config = RunConfig.from_dict(
        {
            "epochs": 2,
            "batch_size": 50,
            "threads": 1,
            "model": {"name": "experiments.feature_maps:convnet", "options": {"widths": [4, 6]}},
            "data": {"name": "digits", "train_size": 200},
            "decor": {"lr": 1e-2, "mode": "features"},
        }
    )
    run(config, tmp_path, progress=False)
    last = (tmp_path / "metrics.csv").read_text().splitlines()[-1]
    assert float(last.split(",")[-1]) > 0  # the decorrelation loss
    assert json.loads((tmp_path / "result.json").read_text())["peak_memory_bytes"] > 1e6

    trainer = Trainer(config, torch.device("cpu"))
    for batch in trainer.task.batches(0):
        trainer.step(batch)
    layers = [m for m in trainer.task.model.modules() if isinstance(m, dbp.nn.Decorrelate)]
    assert not any(torch.equal(m.R, torch.eye(m.num_features)) for m in layers)
    again = Trainer(config, torch.device("cpu"))
    again.load_state_dict(trainer.state_dict())
    kept = nn.utils.parameters_to_vector(again.task.model.buffers())
    assert torch.equal(kept, nn.utils.parameters_to_vector(trainer.task.model.buffers()))
    assert again.optimizers.decor._steps == trainer.optimizers.decor._steps == 3
    for each in (trainer, again):  # R's rate is a share of the highest so far, in the copy too
        each.optimizers.step(0.25)
        assert each.optimizers.decor.param_groups[0]["lr"] == pytest.approx(0.25e-2)
