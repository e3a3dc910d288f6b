"""Crops, mirroring and cutout, drawn for a whole epoch at once and done to a batch on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# In pixels, where none are given.
USUAL = {"crop": 4, "cutout": 8}


@dataclass(frozen=True)
class Augment:
    """What is done to images that are trained on; by default nothing.

    Attributes:
        crop: a crop of the image's own size, at random from the image with so many pixels mirrored
            around it.
        flip: left and right are exchanged in every second image.
        cutout: a square with so many pixels a side, centred anywhere, becomes the images' mean
            (DeVries and Taylor 2017).
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    @classmethod
    def parse(cls, names: Sequence[str]) -> Augment:
        """From ["crop:4", "flip", "cutout:8"]; without a number a crop has 4, a cutout 8 pixels.

        They are done in this order, whatever theirs. Raises ValueError for any other name.
        """
        values: dict[str, int] = {}
        for name in names:
            kind, colon, number = name.partition(":")
            known = kind in USUAL and (not colon or (number.isdecimal() and int(number) > 0))
            if not (known or name == "flip") or kind in values:
                raise ValueError(
                    f"augment has {name!r}: expected crop, flip and cutout, each at most once, with "
                    "pixels as in 'crop:4' and 'cutout:8'"
                )
            values[kind] = int(number) if colon else USUAL.get(kind, 1)
        return cls(values.get("crop", 0), "flip" in values, values.get("cutout", 0))

    def check(self, height: int, width: int) -> None:
        """Raises ValueError if images of this size are too small."""
        if max(self.crop + 1, self.cutout) > min(height, width):
            raise ValueError(
                f"augment has crop {self.crop} and cutout {self.cutout}, expected less than a side "
                f"and at most a side of images of {height}x{width}"
            )

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """int64 (5, count), on the CPU: the crop's place, whether mirrored, the cutout's centre."""
        highest = (2 * self.crop, 2 * self.crop, int(self.flip), height - 1, width - 1)
        drawn = [torch.randint(high + 1, (count,), generator=generator) for high in highest]
        return torch.stack(drawn)

    def crops(self, images: Tensor, chosen: Tensor, drawn: Tensor) -> Tensor:
        """images[chosen], cropped and mirrored.

        Args:
            images: (N, C, H, W).
            chosen: int64 (n,), numbers of images.
            drawn: (5, n), of `draw`.

        Returns:
            (n, C, H, W).
        """
        channels, height, width = images.shape[1:]
        rows = _mirrored(drawn[0], self.crop, height)
        columns = _mirrored(drawn[1], self.crop, width)
        columns = torch.where(drawn[2][:, None] == 1, columns.flip(1), columns)
        # One gather within each channel: faster than to index rows and columns.
        at = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        at = at[:, None].expand(-1, channels, -1)
        return images[chosen].flatten(2).gather(2, at).unflatten(2, (height, width))

    def cut(self, x: Tensor, drawn: Tensor) -> Tensor:
        """x (n, C, H, W), normalised, with a square of zeros in each."""
        if not self.cutout:
            return x
        inside = [
            (
                (torch.arange(side, device=x.device) - centre[:, None] + self.cutout // 2)
                // self.cutout
            )
            == 0
            for side, centre in zip(x.shape[2:], drawn[3:])
        ]
        return x.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


NOTHING = Augment()


def _mirrored(shift: Tensor, border: int, size: int) -> Tensor:
    """(n, size): which of ``size`` rows lie in a crop, ``shift`` below the upper edge of a border."""
    at = shift[:, None] - border + torch.arange(size, device=shift.device)
    at = at.abs()  # beyond the upper edge
    return torch.where(at < size, at, 2 * (size - 1) - at)
