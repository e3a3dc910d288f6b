"""An agent that plays, as a task."""

import copy

import pytest
import torch

from experiments.config import RunConfig
from experiments.train import Trainer, run

AGENT = {
    "task": "experiments.agent:Agent",
    "model": {"options": {"channels": 4, "hidden": 16}},
    "options": {"players": 4, "horizon": 16, "frames": 128, "judged": 3, "passes": 2},
    "batch_size": 32,
}


def config(values, **more) -> RunConfig:
    given = {**values, "epochs": 2, "threads": 1, "optimizer": {"name": "adam", "lr": 3e-3}, **more}
    return RunConfig.from_dict(given)


pytest.importorskip("stable_baselines3")
pytest.importorskip("minatar")


@pytest.mark.parametrize("decor", [None, {"lr": 1e-3, "sample": 0.5}], ids=["bp", "dbp"])
def test_a_run_writes_its_files(decor, tmp_path):
    result = run(config(AGENT, decor=decor), tmp_path, progress=False)
    assert result["status"] == "finished"
    assert result["flops_per_step"] > 0
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_going_on_from_a_checkpoint_is_exact():
    """Weights and scores of a second epoch, in the same process and after a new start."""
    made = config(AGENT, decor={"lr": 1e-3, "sample": 0.5})
    first = Trainer(made, torch.device("cpu"))
    epoch(first, 0)
    state = copy.deepcopy(first.state_dict())
    second = Trainer(made, torch.device("cpu"))
    second.load_state_dict(copy.deepcopy(state))
    scores = [epoch(second, 1)]
    first.load_state_dict(state)
    scores.append(epoch(first, 1))
    assert scores[0] == scores[1]
    for a, b in zip(first.task.model.parameters(), second.task.model.parameters()):
        assert torch.equal(a, b)


def epoch(trainer: Trainer, number: int) -> tuple[float, ...]:
    trainer.task.model.train()
    for batch in trainer.task.batches(number):
        trainer.step(batch)
    return trainer.evaluate("validation") + trainer.evaluate("test")


def test_its_layers_begin_as_those_of_all_networks_here():
    wide = {**AGENT, "model": {"options": {"hidden": 200}}}
    policy = Trainer(config(wide), torch.device("cpu")).task.model
    for layer in policy.features_extractor.see[::3]:
        assert layer.weight.std().item() == pytest.approx(
            (2 / layer.weight[0].numel()) ** 0.5, rel=0.1
        )
        assert not layer.bias.any()


def test_evaluation_repeats_itself_and_leaves_the_generators():
    trainer = Trainer(config(AGENT), torch.device("cpu"))
    before = torch.get_rng_state()
    assert trainer.evaluate("test") == trainer.evaluate("test")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_an_agent_cannot_be_made_of_is_told():
    with pytest.raises(ValueError, match=r"options has \['speed'\]"):
        Trainer(config({**AGENT, "options": {"speed": 1}}), torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size is 48"):
        Trainer(config({**AGENT, "batch_size": 48}), torch.device("cpu"))
