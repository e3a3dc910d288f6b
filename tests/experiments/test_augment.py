"""experiments/data/augment: crops, mirroring and cutout against one image at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data import Augment, Split


def images(count: int = 40, channels: int = 3, height: int = 9, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def one_by_one(x: Tensor, augment: Augment, drawn: Tensor) -> Tensor:
    """By the definitions, with torch's own padding; normalised images in, and out."""
    done = []
    height, width = x.shape[2:]
    for image, (down, right, mirrored, row, column) in zip(x, drawn.t().tolist()):
        padded = F.pad(image[None], [augment.crop] * 4, mode="reflect")[0]
        own = padded[:, down : down + height, right : right + width].clone()
        if mirrored:
            own = own.flip(2)
        top, left = row - augment.cutout // 2, column - augment.cutout // 2
        own[
            :,
            max(top, 0) : max(top + augment.cutout, 0),
            max(left, 0) : max(left + augment.cutout, 0),
        ] = 0
        done.append(own)
    return torch.stack(done)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=2),
        Augment(crop=6),
        Augment(flip=True),
        Augment(cutout=3),
        Augment(cutout=4),
        Augment(crop=4, flip=True, cutout=7),
    ],
)
def test_batches_are_what_one_image_at_a_time_gives(
    augment: Augment, channels: int, channels_last: bool
) -> None:
    pixels = images(channels=channels)
    mean, std = torch.full((channels, 1, 1), 100.0), torch.full((channels, 1, 1), 50.0)
    split = Split(pixels, torch.arange(40), mean, std, augment, channels_last)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(40, generator=generator)
    drawn = augment.draw(40, 9, 7, generator)
    expected = one_by_one((pixels[order].float() - 100) / 50, augment, drawn)
    seen = list(split.batches(16, torch.Generator().manual_seed(5)))
    assert torch.equal(torch.cat([y for _, y in seen]), order)
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), expected)


def test_every_place_is_drawn_about_equally_often() -> None:
    drawn = Augment(crop=2, flip=True, cutout=3).draw(9000, 9, 7, torch.Generator().manual_seed(0))
    for row, count in zip(drawn, (5, 5, 2, 9, 7)):
        often = row.bincount(minlength=count)
        assert len(often) == count
        assert (often - 9000 / count).abs().max() < 5 * (9000 / count) ** 0.5
    assert Augment().draw(5, 9, 7, torch.Generator())[:3].eq(0).all()


def test_without_an_order_images_are_as_they_are() -> None:
    one = torch.ones(3, 1, 1)
    split = Split(images(), torch.arange(40), 0 * one, one, Augment(crop=4, flip=True, cutout=3))
    assert torch.equal(next(split.batches(40))[0], images().float())


def test_names() -> None:
    assert Augment.parse([]) == Augment()
    assert Augment.parse(["flip", "crop:2", "cutout:16"]) == Augment(2, True, 16)
    assert Augment.parse(["crop", "cutout"]) == Augment(4, False, 8)
    for wrong in (
        ["mixup"],
        ["crop:0"],
        ["crop:-1"],
        ["crop:x"],
        ["crop:"],
        ["flip:1"],
        ["flip"] * 2,
    ):
        with pytest.raises(ValueError, match=f"augment has {wrong[-1]!r}: expected crop, flip"):
            Augment.parse(wrong)


@pytest.mark.parametrize("augment", [Augment(crop=7), Augment(cutout=8)])
def test_images_that_are_too_small_are_refused(augment: Augment) -> None:
    one = torch.ones(3, 1, 1)
    split = Split(images(), torch.arange(40), 0 * one, one, augment)
    with pytest.raises(ValueError, match=r"images of 9x7"):
        split.batches(8, torch.Generator())
