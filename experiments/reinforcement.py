"""A reinforcement-learning agent: deep Q-learning in MinAtar's games."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import parallel
from experiments.config import RunConfig
from experiments.extras import need
from experiments.models import build_model
from experiments.models.initialise import he_initialise

RECENT = 100  # episodes of training that the score is the mean of
VALIDATION, TEST = 1_000_000, 2_000_000  # seeds of the games that are evaluated start there


@dataclass(frozen=True)
class Options:
    """``config.options``; the defaults are MinAtar's paper's (Young and Tian 2019), but for the frames.

    Attributes:
        game: "asterix", "breakout", "freeway", "seaquest" or "space_invaders".
        frames: of an epoch.
        train_every: frames from one step of the optimisers to the next.
        memory: frames that are remembered.
        random_first: frames of random actions before the first step.
        explore: frames over which the share of random actions falls from 1 to ``least_random``.
        least_random: the share that stays.
        discount: of a reward one frame later.
        target_every: steps from one copy of the network, whose values are the targets, to the next.
        evaluated: games that are played to evaluate.
        longest: frames after which these end.
    """

    game: str = "breakout"
    frames: int = 10_000
    train_every: int = 1
    memory: int = 100_000
    random_first: int = 5_000
    explore: int = 100_000
    least_random: float = 0.1
    discount: float = 0.99
    target_every: int = 1_000
    evaluated: int = 20
    longest: int = 2_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, int) and not (type(value) is int and value >= 1):
                raise ValueError(f"options.{field.name} is {value!r}: expected an integer from 1")
            if isinstance(default, float) and not (
                isinstance(value, (int, float)) and 0 <= value <= 1
            ):
                raise ValueError(f"options.{field.name} is {value!r}: expected from 0 to 1")
        if self.frames < self.train_every:
            raise ValueError(
                f"options.frames is {self.frames}: expected at least train_every, {self.train_every}"
            )

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"options.{name} is {value!r}: expected one of {known}")
        return cls(**given)


class Frames(NamedTuple):
    """What happened in n frames; before and after: bool (n, C, H, W).

    action: int64 (n,); reward: float32 (n,); over: bool (n,), whether the game ended.
    """

    before: Tensor
    action: Tensor
    reward: Tensor
    over: Tensor
    after: Tensor


def q_network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """MinAtar's paper's: 16 convolutions of 3x3, 128 hidden units, a value for each action."""
    channels, height, width = image_shape
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * (height - 2) * (width - 2), 128),
        nn.ReLU(inplace=True),
        nn.Linear(128, num_classes),
    )
    he_initialise(model)
    return model


def make_game(name: str, seed: int) -> Any:
    """A new game of MinAtar's. Raises ImportError without that, ValueError for an unknown game."""
    minatar = need("minatar", "MinAtar", "a game to play", extra="games")
    try:
        game = minatar.Environment(name)
    except ImportError as error:
        raise ValueError(f"options.game is {name!r}: expected one of MinAtar's") from error
    game.seed(seed)
    game.reset()
    return game


def seen(game: Any) -> Tensor:
    """bool (C, H, W)."""
    return torch.from_numpy(game.state()).bool().permute(2, 0, 1).contiguous()


class Memory:
    """The last ``capacity`` frames."""

    def __init__(self, capacity: int, shape: tuple[int, int, int]) -> None:
        self.count = 0  # of all frames so far
        self.frames = Frames(
            torch.zeros(capacity, *shape, dtype=torch.bool),
            torch.zeros(capacity, dtype=torch.int64),
            torch.zeros(capacity),
            torch.zeros(capacity, dtype=torch.bool),
            torch.zeros(capacity, *shape, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return min(self.count, len(self.frames.action))

    def add(self, before: Tensor, action: int, reward: float, over: bool, after: Tensor) -> None:
        at = self.count % len(self.frames.action)
        for kept, new in zip(self.frames, (before, action, reward, over, after)):
            kept[at] = new
        self.count += 1

    def some(self, count: int, generator: torch.Generator) -> Frames:
        chosen = torch.randint(len(self), (count,), generator=generator)
        return Frames(*(kept[chosen] for kept in self.frames))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "frames": [kept[: len(self)].clone() for kept in self.frames]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for kept, saved in zip(self.frames, state["frames"]):
            kept[: len(saved)] = saved


class DeepQ:
    """Deep Q-learning (Mnih et al. 2015): ``task: experiments.reinforcement:DeepQ``.

    ``config.options`` are `Options`; ``config.data`` is not used. An epoch begins a new game, and
    makes ``options.frames`` frames. The training score is the mean return of the last ``RECENT``
    games played to learn; the score of an evaluation, and minus its loss, that of games of their own
    played without random actions.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        if parallel.world() > 1:
            raise ValueError(f"expected one process to play, not {parallel.world()}")
        self.options = options = Options.of(config.options)
        self.seed, self.batch_size, self.device = config.seed, config.batch_size, device
        game = make_game(options.game, 0)
        self.actions = game.minimal_action_set()
        height, width, channels = game.state_shape()
        shape = channels, height, width
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = build_model(config.model.name, shape, len(self.actions), **config.model.options)
        self.model = model.to(device=device, memory_format=layout)
        self.target = copy.deepcopy(self.model)
        self.memory = Memory(options.memory, shape)
        self.steps_per_epoch = options.frames // options.train_every
        self.returns: list[float] = []  # of games that are over, the last RECENT

    def batches(self, epoch: int) -> Iterator[Frames]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        play = self._play(self.seed * 1_000_003 + epoch, generator)
        next(play)
        if not len(self.memory):
            for _ in range(self.options.random_first):
                play.send(1.0)
        options = self.options
        for frame in range(self.steps_per_epoch * options.train_every):
            done = (epoch * options.frames + frame) / options.explore
            play.send(max(1 - done * (1 - options.least_random), options.least_random))
            if (frame + 1) % options.train_every == 0:
                step = epoch * self.steps_per_epoch + frame // options.train_every
                if step % options.target_every == 0:
                    self.target.load_state_dict(self.model.state_dict())
                some = self.memory.some(self.batch_size, generator)
                yield Frames(*(part.to(self.device, non_blocking=True) for part in some))

    def _play(self, seed: int, generator: torch.Generator) -> Generator[None, float, None]:
        """Plays and remembers a frame for each share of random actions that is sent."""
        game = make_game(self.options.game, seed % 2**32)
        before, total = seen(game), 0.0
        while True:
            share = yield
            if torch.rand((), generator=generator) < share:
                action = int(torch.randint(len(self.actions), (), generator=generator))
            else:
                action = int(self._values(before[None]).argmax())
            reward, over = game.act(self.actions[action])
            after = seen(game)
            self.memory.add(before, action, float(reward), bool(over), after)
            total += float(reward)
            if over:
                self.returns = [*self.returns, total][-RECENT:]
                game.reset()
                after, total = seen(game), 0.0
            before = after

    def _values(self, images: Tensor) -> Tensor:
        """Of each action, (n, actions), by the network as it is."""
        with torch.no_grad():
            return self.model(images.to(self.device).float())

    def loss(self, model: nn.Module, batch: Frames) -> tuple[Tensor, Tensor]:
        values = model(batch.before.float()).gather(1, batch.action[:, None])[:, 0]
        with torch.no_grad():
            best = self.target(batch.after.float()).amax(1)
            targets = batch.reward + self.options.discount * best * ~batch.over
        score = sum(self.returns) / max(len(self.returns), 1)
        return F.smooth_l1_loss(values, targets), torch.tensor(score, device=self.device)

    def evaluate(self, split: str) -> tuple[float, float]:
        first = {"validation": VALIDATION, "test": TEST}[split]
        games = [make_game(self.options.game, first + i) for i in range(self.options.evaluated)]
        total = 0.0
        for _ in range(self.options.longest):
            if not games:
                break
            actions = self._values(torch.stack([seen(game) for game in games])).argmax(1).tolist()
            played = [(game, *game.act(self.actions[a])) for game, a in zip(games, actions)]
            total += sum(reward for _, reward, _ in played)
            games = [game for game, _, over in played if not over]
        score = total / self.options.evaluated
        return -score, score

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory.state_dict(),
            "target": self.target.state_dict(),
            "returns": list(self.returns),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.target.load_state_dict(state["target"])
        self.returns = list(state["returns"])
