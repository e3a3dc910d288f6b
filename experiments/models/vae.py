"""A convolutional variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.initialise import he_initialise


class VAE(nn.Module):
    """A variational autoencoder (Kingma and Welling 2014); its decoder's convolutions are transposed.

    Args:
        image_shape: (channels, height, width); sides are multiples of 2 ** len(widths).
        widths: channels of the encoder's convolutions, each of which halves both sides; the
            decoder has them in reverse.
        latent: entries of the latent vector.

    ``forward`` takes images (N, *image_shape) and returns the reconstruction's logits
    (N, *image_shape) and mean and log variance (N, latent) of the latent vector. Training draws
    the latent vector from torch's global generator; in eval mode it is the mean.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        widths: Sequence[int] = (32, 64),
        latent: int = 20,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        shrink = 2 ** len(widths)
        if height % shrink or width % shrink:
            raise ValueError(
                f"images of {height}x{width} cannot be halved {len(widths)} times: expected sides "
                f"that are multiples of {shrink}"
            )
        small = (widths[-1], height // shrink, width // shrink)
        features = small[0] * small[1] * small[2]
        down: list[nn.Module] = []
        for cin, cout in zip((channels, *widths), widths):
            down += [nn.Conv2d(cin, cout, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.mean, self.log_variance = nn.Linear(features, latent), nn.Linear(features, latent)
        up: list[nn.Module] = [nn.Linear(latent, features), nn.Unflatten(1, small)]
        backwards = tuple(reversed(widths))
        for cin, cout in zip(backwards, (*backwards[1:], channels)):
            up += [nn.ReLU(inplace=True), nn.ConvTranspose2d(cin, cout, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*up)
        he_initialise(self)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (N, latent) each, of images (N, *image_shape)."""
        features = self.encoder(x)
        return self.mean(features), self.log_variance(features)

    def decode(self, z: Tensor) -> Tensor:
        """Logits (N, *image_shape) of latent vectors (N, latent)."""
        logits: Tensor = self.decoder(z)
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        z = mean
        if self.training:
            z = sample(mean, log_variance, torch.randn_like(mean))
        return self.decode(z), mean, log_variance


def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Latent vectors from standard normal noise, all (N, latent)."""
    return mean + (0.5 * log_variance).exp() * noise


def negative_elbo(logits: Tensor, mean: Tensor, log_variance: Tensor, images: Tensor) -> Tensor:
    """Minus the evidence lower bound in nats, a mean over images: what a VAE minimises.

    Args:
        logits, mean, log_variance: what `VAE` returns.
        images: (N, channels, height, width) with values in [0, 1], taken as probabilities.
    """
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    return (reconstruction + divergence) / len(images)
