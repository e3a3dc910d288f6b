"""Real images as tensors: scikit-learn's bundled digits; MNIST and CIFAR-10 from parquet files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.extras import need

DATASETS = ("digits", "mnist", "cifar10")

# How a parquet file may name its columns: the public hub's names for MNIST and CIFAR-10, as a
# struct {bytes, path} or flattened.
IMAGE_COLUMNS = ("image", "img", "image.bytes", "img.bytes")
LABEL_COLUMNS = ("label", "labels")
HUB_NAMES = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}

DIGITS_TEST = 450


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32, and labels (N,), int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device, channels_last: bool = False) -> Split:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return Split(self.x.to(device, memory_format=layout), self.y.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, normalised per channel by the training split's mean and deviation."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    def to(self, device: torch.device, channels_last: bool = False) -> Dataset:
        splits = {
            name: getattr(self, name).to(device, channels_last)
            for name in ("train", "validation", "test")
        }
        return replace(self, **splits)


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    validation_fraction: float = 0.1,
) -> Dataset:
    """Loads a dataset, splits off its validation images and normalises it.

    Args:
        name: "digits", "mnist" or "cifar10".
        data_dir: folder with ``train-*.parquet`` and ``test-*.parquet``, itself or in a subfolder
            called ``name``; not used by digits.
        train_size, test_size: the first so many images of each file order (``None``: all).
        validation_fraction: the last so much of the training images becomes the validation split.

    Digits: 1797 images of 8x8. One fixed permutation (seed 0) puts 450 images into the test split
    and 1347 into training and validation.

    Raises:
        ValueError: unknown name, or sizes that leave a split empty.
        FileNotFoundError: no parquet files; the message names every place that was looked at.
    """
    if name == "digits":
        train, test = _digits()
        train = Split(train.x[:train_size], train.y[:train_size])
        test = Split(test.x[:test_size], test.y[:test_size])
    elif name in DATASETS:
        train = _parquet_split(name, Path(data_dir), "train", train_size)
        test = _parquet_split(name, Path(data_dir), "test", test_size)
    else:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    held_out = round(validation_fraction * len(train))
    kept = len(train) - held_out
    if min(held_out, kept, len(test)) < 1:
        raise ValueError(
            f"{name}: {len(train)} training images with validation_fraction {validation_fraction} "
            f"and {len(test)} test images leave a split empty"
        )
    return normalise(
        Dataset(
            name,
            Split(train.x[:kept], train.y[:kept]),
            Split(train.x[kept:], train.y[kept:]),
            test,
        )
    )


def normalise(data: Dataset) -> Dataset:
    """Zero mean and unit deviation per channel, measured on the training split alone."""
    mean = data.train.x.mean((0, 2, 3), keepdim=True)
    std = data.train.x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    splits = {
        name: Split((getattr(data, name).x - mean) / std, getattr(data, name).y)
        for name in ("train", "validation", "test")
    }
    return replace(data, **splits)


def _digits() -> tuple[Split, Split]:
    datasets = need("sklearn.datasets", "scikit-learn", "the digits images")
    bundle = datasets.load_digits()
    x = torch.from_numpy(bundle.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(bundle.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return Split(x[train], y[train]), Split(x[test], y[test])


def find_parquet(name: str, data_dir: Path, split: str) -> list[Path]:
    """The sorted ``split-*.parquet`` files in ``data_dir`` or a subfolder as the hub has them."""
    folders = [data_dir, data_dir / name, data_dir / "plain_text", data_dir / name / "plain_text"]
    for folder in folders:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return files
    looked = ", ".join(str(folder) for folder in folders)
    missing = "" if data_dir.is_dir() else f" ({data_dir} is not a folder)"
    raise FileNotFoundError(
        f"no {split}-*.parquet for {name} in any of: {looked}{missing}. Put the parquet files of "
        f"the public hub's dataset {HUB_NAMES.get(name, name)} there, or point --data-dir at them"
    )


def _parquet_split(name: str, data_dir: Path, split: str, limit: int | None) -> Split:
    images: list[Tensor] = []
    labels: list[int] = []
    for path in find_parquet(name, data_dir, split):
        left = None if limit is None else limit - len(labels)
        if left is not None and left <= 0:
            break
        new_images, new_labels = read_parquet(path, left)
        images += new_images
        labels += new_labels
    if not images:
        raise ValueError(f"{name}: the {split} parquet files in {data_dir} hold no images")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"{name}: images of different shapes in {data_dir}: {sorted(shapes)}")
    return Split(torch.stack(images).float() / 255, torch.tensor(labels, dtype=torch.int64))


def read_parquet(path: Path, limit: int | None = None) -> tuple[list[Tensor], list[int]]:
    """Decodes up to ``limit`` rows of one file into uint8 images (C, H, W) and integer labels.

    Raises ValueError, naming the file and its columns, when no image or label column is there.
    """
    pq = need("pyarrow.parquet", "pyarrow", "reading parquet files")
    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    image_column = _first(IMAGE_COLUMNS, columns, path, "image")
    label_column = _first(LABEL_COLUMNS, columns, path, "label")
    images: list[Tensor] = []
    labels: list[int] = []
    for batch in file.iter_batches(batch_size=1024, columns=[image_column, label_column]):
        if limit is not None:
            batch = batch.slice(0, limit - len(labels))
        for cell in batch.column(image_column).to_pylist():
            images.append(_decode(cell["bytes"] if isinstance(cell, dict) else cell))
        labels += batch.column(label_column).to_pylist()
        if limit is not None and len(labels) >= limit:
            break
    return images, labels


def _first(candidates: Sequence[str], columns: Sequence[str], path: Path, what: str) -> str:
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(
        f"{path}: no {what} column; looked for {', '.join(candidates)}, found {', '.join(columns)}"
    )


def _decode(data: bytes) -> Tensor:
    """PNG or JPEG bytes -> uint8 (C, H, W); greyscale has one channel, everything else three."""
    pillow = need("PIL.Image", "pillow", "decoding images")
    image = pillow.open(io.BytesIO(data))
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()
