"""A data set of images in three splits, held as bytes on the device that trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.data.augment import NOTHING, Augment

if TYPE_CHECKING:
    from experiments.data.streamed import StreamedSplit


@dataclass(frozen=True)
class Split:
    """Images and labels, all in memory.

    Attributes:
        images: uint8 (N, C, H, W).
        y: int64 (N,).
        mean, std: float32 (C, 1, 1), in pixel values: what makes batches of zero mean and unit
            deviation.
        augment: what ``batches`` does to images that are trained on.
        channels_last: memory format of batches, and of ``x``.
    """

    images: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor
    augment: Augment = NOTHING
    channels_last: bool = False

    def __len__(self) -> int:
        return len(self.y)

    @cached_property
    def x(self) -> Tensor:
        """All images, normalised: float32 (N, C, H, W), four times as large, made at first use."""
        return self._normalised(self.images).contiguous(memory_format=self._layout)

    def to(self, device: torch.device, channels_last: bool = False) -> Split:
        tensors = {name: getattr(self, name).to(device) for name in ("images", "y", "mean", "std")}
        return replace(self, **tensors, channels_last=channels_last)

    def batches(
        self,
        batch_size: int,
        order: torch.Generator | None = None,
        *,
        part: tuple[int, int] = (0, 1),
        first: int = 0,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the split: normalised images, float32 (n, C, H, W), and labels (n,).

        Args:
            batch_size: images of a batch, those of all processes together.
            order: a CPU generator. What the pass needs of it, order and augmentation, is drawn by
                this call. None: no augmentation, the images as they lie.
            part: (rank, processes): this process gets every so many-th image of each batch, which of
                a last batch that is smaller may be none.
            first: so many batches are left out: with the generator as it was before, an interrupted
                pass goes on.
            drop_last: leave out the last batch if it is smaller.
        """
        count, device = len(self), self.y.device
        numbers, drawn = torch.arange(count), None
        if order is not None:
            numbers = torch.randperm(count, generator=order)
            height, width = self.images.shape[2:]
            self.augment.check(height, width)
            # All at once: a copy in every step would wait for the device.
            drawn = self.augment.draw(count, height, width, order).to(device)
        return self._pass(
            numbers.to(device), drawn, batch_bounds(count, batch_size, first, drop_last), part
        )

    def _pass(
        self,
        numbers: Tensor,
        drawn: Tensor | None,
        bounds: Iterator[tuple[int, int]],
        part: tuple[int, int],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in bounds:
            own = slice(start + part[0], stop, part[1])
            chosen = numbers[own]
            if drawn is None or self.augment == NOTHING:
                x = self._normalised(self.images[chosen])
            else:
                x = self._normalised(self.augment.crops(self.images, chosen, drawn[:, own]))
                x = self.augment.cut(x, drawn[:, own])
            yield x.contiguous(memory_format=self._layout), self.y[chosen]

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean).div_(self.std)


def batch_bounds(
    count: int, batch_size: int, first: int, drop_last: bool
) -> Iterator[tuple[int, int]]:
    """(start, stop) of each batch of ``count`` images, but for the ``first`` so many."""
    last = count - batch_size + 1 if drop_last else count
    for start in range(first * batch_size, last, batch_size):
        yield start, min(start + batch_size, count)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, normalised per channel by the training split's mean and deviation.

    Attributes:
        name: as ``load`` was given it.
        train, validation, test: all in memory, or all read from disk batch by batch.
        image_shape: (channels, height, width).
        num_classes: labels lie in [0, num_classes).
    """

    name: str
    train: Split | StreamedSplit
    validation: Split | StreamedSplit
    test: Split | StreamedSplit
    image_shape: tuple[int, int, int]
    num_classes: int

    def to(self, device: torch.device, channels_last: bool = False) -> Dataset:
        splits = {
            name: getattr(self, name).to(device, channels_last)
            for name in ("train", "validation", "test")
        }
        return replace(self, **splits)


def kept_of(name: str, train: int, test: int, validation_fraction: float) -> int:
    """How many of ``train`` images are trained on; raises ValueError if a split would be empty."""
    held_out = round(validation_fraction * train)
    if min(held_out, train - held_out, test) < 1:
        raise ValueError(
            f"{name}: {train} training images with validation_fraction {validation_fraction} "
            f"and {test} test images leave a split empty"
        )
    return train - held_out


def mean_and_deviation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel over uint8 images (N, C, H, W): two float32 (C, 1, 1), in pixel values.

    From counts of each value, exactly and without a copy of the images in floating point.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in images.unbind(1)]).double()
    total = counts.sum(1, keepdim=True)
    mean = (counts * values).sum(1, keepdim=True) / total
    variance = (counts * (values - mean).square()).sum(1, keepdim=True) / (total - 1).clamp_min(1)
    std = torch.where(variance > 0, variance.sqrt(), 1)  # a channel may be of one value alone
    return mean.float()[:, :, None], std.float()[:, :, None]
