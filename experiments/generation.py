"""A generative model of images: a variational autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.models import VAE, negative_elbo, sample
from experiments.tasks import EVALUATED, Classification


class Generation(Classification):
    """Images without their classes, by a ``models.VAE``: ``task: experiments.generation:Generation``.

    Loss and minus the score are the negative evidence lower bound in nats per image, of latent
    vectors drawn from torch's generator in training, and always the same in evaluation. It takes
    pixels for probabilities: ``data.options`` must have ``normalise: false``.
    """

    model: VAE

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        if config.data.options.get("normalise", True):
            raise ValueError(
                "data.options.normalise is not given or true: expected false for a VAE"
            )
        if config.options:
            raise ValueError(f"options has {sorted(config.options)}: expected nothing for a VAE")
        super().__init__(config, device)
        if not isinstance(self.model, VAE):
            raise ValueError(
                f"model.name is {config.model.name!r}: expected vae, or one of its kind"
            )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = batch
        loss = negative_elbo(*model(x), x)
        return loss, -loss.detach()

    def evaluate(self, split: str) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros((), device=self.device)
        images: Iterator[tuple[Tensor, Tensor]] = getattr(self.data, split).batches(EVALUATED)
        for x, _ in images:
            mean, log_variance = self.model.encode(x)
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            logits = self.model.decode(sample(mean, log_variance, noise))
            bound = negative_elbo(logits.float(), mean.float(), log_variance.float(), x)
            total += bound * len(x)
        loss = total.item() / len(getattr(self.data, split))
        return loss, -loss
