"""Task ``experiments.agent:Agent``: proximal policy optimisation on MinAtar's games.

The games (Young and Tian 2019) and their interface are the libraries MinAtar and gymnasium; playing and
advantages are Stable-Baselines3's. Here are only the loss, so that any optimiser can step on it, and
what an exact continuation needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.extras import need
from experiments.models.initialise import he_initialise

# config.options, with Stable-Baselines3's defaults but for what its authors use on small games.
OPTIONS = {
    "game": "Breakout",
    "players": 16,  # games played side by side
    "horizon": 64,  # steps of each between two updates
    "passes": 4,  # over what was played
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "entropy": 0.01,
    "value": 0.5,  # weight of the value's loss
    "frames": 102400,  # of an epoch
    "judged": 50,  # games of an evaluation
}
LONGEST = 2500  # frames of a game that is judged: some never end
_SEEDS = {"validation": 10_000, "test": 20_000}


class Agent:
    """An agent that learns to play; the score is the mean return of whole games.

    ``model.options``: ``channels`` (16) of its convolution, ``hidden`` (128). ``config.options``: see
    `OPTIONS`. ``batch_size`` frames a step.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        unknown = set(config.options) - set(OPTIONS)
        if unknown:
            raise ValueError(f"options has {sorted(unknown)}: expected some of {list(OPTIONS)}")
        self.options: dict[str, Any] = {**OPTIONS, **config.options}
        o = self.options
        played = o["players"] * o["horizon"]
        if played % config.batch_size or o["frames"] % played:
            raise ValueError(
                f"batch_size is {config.batch_size} and options.frames {o['frames']}: expected them "
                f"to divide, and to be a multiple of, players * horizon = {played}"
            )
        ppo = need("stable_baselines3", "stable-baselines3", "playing games", "games").PPO
        env_util = need(
            "stable_baselines3.common.env_util", "stable-baselines3", "playing games", "games"
        )
        self.batch_size, self.device, self.seed = config.batch_size, device, config.seed
        self.updates = o["frames"] // played
        self.steps_per_epoch = self.updates * o["passes"] * played // config.batch_size
        self.games = env_util.make_vec_env(lambda: _game(o["game"]), o["players"], config.seed)
        self.player = ppo(
            "MlpPolicy",
            self.games,
            n_steps=o["horizon"],
            batch_size=config.batch_size,
            gamma=o["gamma"],
            gae_lambda=o["gae_lambda"],
            seed=config.seed,
            device=device,
            policy_kwargs={
                "features_extractor_class": _eyes(),
                "features_extractor_kwargs": {
                    "channels": config.model.options.get("channels", 16),
                    "hidden": config.model.options.get("hidden", 128),
                },
                "net_arch": [],
                "ortho_init": False,
            },
        )
        self.model: nn.Module = self.player.policy
        _, self._told = self.player._setup_learn(o["frames"], None)
        self._told.on_training_start({}, {})

    def batches(self, epoch: int) -> Iterator[Any]:
        """Plays, and gives what was played in random batches, several times over."""
        player, o = self.player, self.options
        for _ in range(self.updates):
            self.model.train(False)
            player.collect_rollouts(self.games, self._told, player.rollout_buffer, o["horizon"])
            self.model.train(True)
            for _ in range(o["passes"]):
                yield from player.rollout_buffer.get(self.batch_size)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """PPO's (Schulman et al. 2017, equation 9); the score is the mean of the values."""
        o = self.options
        policy: Any = self.model
        values, log_probability, entropy = policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten()
        )
        advantages = batch.advantages
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (log_probability - batch.old_log_prob).exp()
        clipped = ratio.clamp(1 - o["clip_range"], 1 + o["clip_range"])
        surrogate = torch.min(advantages * ratio, advantages * clipped).mean()
        value = F.mse_loss(batch.returns, values.flatten())
        loss = -surrogate + o["value"] * value - o["entropy"] * entropy.mean()
        return loss, values.detach().mean()

    def evaluate(self, split: str) -> tuple[float, float]:
        """Games of their own, played by the policy's probabilities, always by the same chance."""
        judged = self.options["judged"]
        env_util = need(
            "stable_baselines3.common.env_util", "stable-baselines3", "playing games", "games"
        )
        games = env_util.make_vec_env(
            lambda: _game(self.options["game"], LONGEST), judged, _SEEDS[split]
        )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_SEEDS[split])
            policy: Any = self.model
            seen: Any = games.reset()
            returns, playing = np.zeros(judged), np.ones(judged, dtype=bool)
            while playing.any():
                actions, _ = policy.predict(seen)
                seen, rewards, over, _ = games.step(actions)
                returns += rewards * playing
                playing &= ~over
        score = float(returns.mean())
        return -score, score

    def state_dict(self) -> dict[str, Any]:
        """The games as they stand, and what was seen of them last."""
        player = self.player
        state = {
            "games": [game.unwrapped for game in self.games.envs],
            "seen": player._last_obs,
            "begun": player._last_episode_starts,
            "random": np.random.get_state(),  # noqa: NPY002 - the one that the libraries draw from
        }
        return {"pickled": torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Unpickles the games, which may execute anything: for checkpoints of one's own only."""
        held = pickle.loads(state["pickled"].numpy().tobytes())
        for game, its in zip(self.games.envs, held["games"], strict=True):
            vars(game.unwrapped).update(vars(its))
        self.player._last_obs, self.player._last_episode_starts = held["seen"], held["begun"]
        np.random.set_state(held["random"])  # noqa: NPY002


def _game(name: str, longest: int | None = None) -> Any:
    gymnasium = need("gymnasium", "gymnasium", "its games", "games")
    if f"MinAtar/{name}-v1" not in gymnasium.registry:
        need("minatar.gym", "minatar", "its games", "games").register_envs()
    game = gymnasium.make(f"MinAtar/{name}-v1", max_episode_steps=longest)
    shape = game.observation_space.shape
    space = gymnasium.spaces.Box(0.0, 1.0, (shape[2], *shape[:2]), np.float32)
    return gymnasium.wrappers.TransformObservation(
        game, lambda board: board.transpose(2, 0, 1).astype(np.float32), space
    )


def _eyes() -> type[nn.Module]:
    """A convolution and a linear layer, as MinAtar's authors use them."""
    layers = need(
        "stable_baselines3.common.torch_layers", "stable-baselines3", "playing games", "games"
    )

    class Eyes(layers.BaseFeaturesExtractor):  # type: ignore[misc, name-defined]
        def __init__(self, space: Any, channels: int, hidden: int) -> None:
            super().__init__(space, hidden)
            planes, height, width = space.shape
            self.see = nn.Sequential(
                nn.Conv2d(planes, channels, 3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(channels * (height - 2) * (width - 2), hidden),
                nn.ReLU(),
            )
            he_initialise(self)

        def forward(self, boards: Tensor) -> Tensor:
            seen: Tensor = self.see(boards)
            return seen

    return Eyes
