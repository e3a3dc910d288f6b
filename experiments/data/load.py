"""Data sets by name, as configurations and the command line have them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data.augment import Augment
from experiments.data.parquet import KNOWN, find_parquet, read_split
from experiments.data.sets import Dataset, Split, kept_of, mean_and_deviation
from experiments.data.streamed import load_streamed
from experiments.extras import need

IN_MEMORY = ("digits", *KNOWN)
STREAMED = ("folder", "parquet")
DATASETS = (*IN_MEMORY, *STREAMED)

DIGITS_TEST, DIGITS_CLASSES = 450, 10


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    validation_fraction: float = 0.1,
    augment: Sequence[str] = (),
    **options: Any,
) -> Dataset:
    """Loads a data set and splits off its validation images.

    Args:
        name: "digits" (scikit-learn's), "mnist" or "cifar10" (parquet files as on the public hub),
            held in memory as bytes; "folder" or "parquet", large images that stay on disk: see
            `load_streamed`.
        data_dir: folder with ``train-*.parquet`` and ``test-*.parquet``, itself or in a subfolder
            called ``name``; not used by digits.
        train_size, test_size: the first so many images of each file order (``None``: all).
        validation_fraction: the last so much of the training images becomes the validation split.
        augment: what is done to images that are trained on: see `Augment.parse`. Large images always
            have crops of random size and are mirrored, and take nothing else.
        options: ``normalise`` (True): zero mean and unit deviation per channel, measured on the
            training split alone; False: pixels are in [0, 1]. Of digits also ``size`` (8): their
            height and width, to which they are enlarged bilinearly. Of large images:
            `load_streamed`'s.

    Digits: 1797 images, of 8x8 as they come. One fixed permutation (seed 0) puts 450 images into the test split
    and 1347 into training and validation.

    Raises:
        ValueError: an unknown name or option, sizes that leave a split empty, broken files (see
            `read_parquet`).
        FileNotFoundError: no parquet files; the message names every place that was looked at.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    large = name in STREAMED
    takes = ["normalise", "size"] if name == "digits" else ["normalise"]
    if large:
        takes = [*inspect.signature(load_streamed).parameters][5:]
    for key, value in options.items():
        if key not in takes:
            raise ValueError(f"{name} has no option {key!r} (got {value!r}): expected {takes}")
    augmentation = Augment.parse(augment)
    sizes = {"train_size": train_size, "test_size": test_size}
    if large:
        if augment:
            raise ValueError(
                f"{name} always has random crops and mirrored images, and no augment besides: got "
                f"{list(augment)}"
            )
        return load_streamed(
            name, Path(data_dir), **sizes, validation_fraction=validation_fraction, **options
        )
    how = (validation_fraction, augmentation, bool(options.get("normalise", True)))
    if name == "digits":
        return _divided(name, *_digits(options.get("size", 8)), train_size, test_size, *how)
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # said in its turn, by who reads them
        for split in ("train", "test"):
            found += find_parquet(name, Path(data_dir), split)
    states = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in found)
    return _of_parquet(name, Path(data_dir), states, train_size, test_size, *how)


@functools.lru_cache(maxsize=1)
def _of_parquet(
    name: str,
    data_dir: Path,
    states: tuple[tuple[Path, int, int], ...],
    train_size: int | None,
    test_size: int | None,
    *how: Any,
) -> Dataset:
    """Kept, as long as the files stay what they are: decoding takes longer than a short run, and a
    process may make many runs."""
    train = read_split(name, data_dir, "train", train_size)
    test = read_split(name, data_dir, "test", test_size)
    return _divided(name, train, test, train_size, test_size, *how)


def _divided(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    train_size: int | None,
    test_size: int | None,
    validation_fraction: float,
    augmentation: Augment,
    normalise: bool,
) -> Dataset:
    train = train[0][:train_size], train[1][:train_size]
    test = test[0][:test_size], test[1][:test_size]
    kept = kept_of(name, len(train[1]), len(test[1]), validation_fraction)
    mean, std = mean_and_deviation(train[0][:kept])
    if not normalise:
        mean, std = torch.zeros_like(mean), torch.full_like(std, 255)
    augmentation.check(*train[0].shape[2:])
    return Dataset(
        name,
        Split(train[0][:kept], train[1][:kept], mean, std, augmentation),
        Split(train[0][kept:], train[1][kept:], mean, std),
        Split(*test, mean, std),
        tuple(train[0].shape[1:]),
        KNOWN[name].classes if name in KNOWN else DIGITS_CLASSES,
    )


def _digits(size: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if type(size) is not int or not 8 <= size <= 64:
        raise ValueError(f"size of digits is {size!r}: expected an int from 8 to 64")
    datasets = need("sklearn.datasets", "scikit-learn", "the digits images")
    bundle = datasets.load_digits()
    small = torch.from_numpy(bundle.images).float().unsqueeze(1)  # from 0 to 16
    larger = functional.interpolate(small, size=(size, size), mode="bilinear")
    images = (larger * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(bundle.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return (images[train], labels[train]), (images[test], labels[test])
