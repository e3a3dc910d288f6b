"""experiments/reinforcement: deep Q-learning on a game of our own, and in MinAtar's."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import checkpoint, reinforcement
from experiments.config import RunConfig
from experiments.metrics import read
from experiments.reinforcement import DeepQ, Memory, Options
from experiments.train import run

pytest.importorskip("tqdm")

BASE: dict[str, Any] = {
    "task": "experiments.reinforcement:DeepQ",
    "epochs": 3,
    "batch_size": 16,
    "threads": 1,
    "save_model": True,
    "model": {"name": "experiments.reinforcement:q_network"},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "options": {
        "frames": 200,
        "memory": 500,
        "random_first": 50,
        "explore": 400,
        "discount": 0.5,
        "target_every": 20,
        "evaluated": 4,
    },
}


class Choice:
    """Ten frames, in each of which that action is rewarded whose side of the image is lit."""

    played = 0
    last = 10**9  # frame at which somebody presses Ctrl-C

    def __init__(self, name: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.frame, self.side = 0, 0

    def state_shape(self) -> list[int]:
        return [4, 6, 2]

    def minimal_action_set(self) -> list[int]:
        return [1, 3]

    def reset(self) -> None:
        self.frame, self.side = 0, int(self.random.integers(2))

    def state(self) -> np.ndarray:
        state = np.zeros((4, 6, 2), dtype=bool)
        state[:, 3 * self.side : 3 * self.side + 3, 0] = True
        return state

    def act(self, action: int) -> tuple[int, bool]:
        Choice.played += 1
        if Choice.played == Choice.last:
            raise KeyboardInterrupt
        reward = int(action == (1, 3)[self.side])
        self.frame, self.side = self.frame + 1, int(self.random.integers(2))
        return reward, self.frame == 10


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> type[Choice]:
    monkeypatch.setattr(reinforcement, "make_game", Choice)
    monkeypatch.setattr(Choice, "last", 10**9)
    return Choice


def config(**changes: Any) -> RunConfig:
    return RunConfig.from_dict({**BASE, **changes})


@pytest.mark.parametrize("decor", [None, {"lr": 1e-3}])
def test_an_agent_learns(choice: type[Choice], tmp_path: Path, decor: dict | None) -> None:
    run(config(decor=decor), tmp_path / "run", progress=False)
    rows = read(tmp_path / "run" / "metrics.csv")
    assert [row.test_loss for row in rows] == [-row.test_score for row in rows]
    # Chance has 5 of 10, in games played to learn with random actions among them.
    assert rows[-1].test_score > 9
    assert rows[-1].validation_score > 9
    assert rows[0].train_score < rows[-1].train_score < 10


def test_a_run_goes_on_exactly_where_it_was_interrupted(
    choice: type[Choice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**BASE["options"], "frames": 60, "random_first": 20, "evaluated": 1}
    some = config(decor={"lr": 1e-3}, options=options)
    run(some, tmp_path / "whole", progress=False)
    # Within the second epoch: warming up takes fewer than 30 frames, an epoch 60, evaluations 20.
    monkeypatch.setattr(choice, "last", choice.played + 30 + 20 + 60 + 20 + 20)
    with pytest.raises(KeyboardInterrupt):
        run(some, tmp_path / "parts", progress=False)
    assert len(read(tmp_path / "parts" / "metrics.csv")) == 1
    run(some, tmp_path / "parts", resume=True, progress=False)
    whole, parts = (
        [{**asdict(row), "seconds": 0} for row in read(tmp_path / name / "metrics.csv")]
        for name in ("whole", "parts")
    )
    assert whole == parts
    weights = [checkpoint.load(tmp_path / name / "model.pt") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_loss_is_by_definition(choice: type[Choice]) -> None:
    torch.manual_seed(0)
    task = DeepQ(config(), torch.device("cpu"))
    torch.nn.init.normal_(task.target[-1].bias)  # another network than the one that learns
    batch = next(task.batches(0))
    assert len(batch.action) == 16
    torch.nn.init.normal_(task.target[-1].bias)
    loss, _ = task.loss(task.model, batch)
    expected = []
    for before, action, reward, over, after in zip(*batch):
        target = reward
        if not over:
            target = target + 0.5 * task.target(after[None].float()).max()
        error = (target - task.model(before[None].float())[0, action]).abs()
        expected.append(0.5 * error**2 if error < 1 else error - 0.5)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_the_target_is_a_copy_every_so_many_steps(choice: type[Choice]) -> None:
    task = DeepQ(config(), torch.device("cpu"))
    bias = task.model[-1].bias
    copied = []
    for _ in task.batches(0):
        copied.append(torch.equal(task.target[-1].bias, bias))
        with torch.no_grad():
            bias += 1
    assert copied == [step % 20 == 0 for step in range(200)]


def test_memory_forgets_the_oldest() -> None:
    memory = Memory(3, (1, 2, 2))
    image = torch.ones(1, 2, 2, dtype=torch.bool)
    for number in range(5):
        memory.add(image, number, float(number), number == 4, ~image)
    assert len(memory) == 3
    some = memory.some(200, torch.Generator().manual_seed(0))
    assert set(some.action.tolist()) == {2, 3, 4}
    assert torch.equal(some.reward, some.action.float())
    assert torch.equal(some.over, some.action == 4)
    assert some.before.all()
    assert not some.after.any()
    other = Memory(3, (1, 2, 2))
    other.load_state_dict(memory.state_dict())
    again = other.some(200, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(some, again))


def test_evaluation_is_the_same_each_time_and_leaves_all_as_it_is(choice: type[Choice]) -> None:
    task = DeepQ(config(), torch.device("cpu"))
    next(task.batches(0))
    before, state = torch.get_rng_state(), task.state_dict()
    assert task.evaluate("test") == task.evaluate("test")
    assert torch.equal(torch.get_rng_state(), before)
    after = task.state_dict()
    assert after["memory"]["count"] == state["memory"]["count"]
    assert after["returns"] == state["returns"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 3}, r"options\.frame is 3: expected one of \['game'"),
        ({"frames": 0}, r"options\.frames is 0: expected an integer from 1"),
        ({"memory": True}, r"options\.memory is True"),
        ({"discount": 2.0}, r"options\.discount is 2\.0: expected from 0 to 1"),
        ({"frames": 3, "train_every": 4}, "options.frames is 3: expected at least train_every, 4"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.of(options)
    assert Options.of({}) == Options()


@pytest.mark.parametrize("game", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_minatars_games(tmp_path: Path, game: str) -> None:
    pytest.importorskip("minatar")
    some = config(epochs=1, decor={"lr": 1e-3})
    options = {**some.options, "game": game, "frames": 50, "longest": 30}
    run(dataclasses.replace(some, options=options), tmp_path / "run", progress=False)
    (row,) = read(tmp_path / "run" / "metrics.csv")
    assert row.step == 50
    assert row.decorrelation_loss is not None
    model = checkpoint.load(tmp_path / "run" / "model.pt")
    assert model["3.weight"].shape == (128, 16 * 8 * 8)


def test_an_unknown_game_is_named() -> None:
    pytest.importorskip("minatar")
    with pytest.raises(ValueError, match=r"options\.game is 'chess'"):
        reinforcement.make_game("chess", 0)
