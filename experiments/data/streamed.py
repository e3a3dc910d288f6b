"""Sets too large for memory, such as ImageNet: folders of images or parquet files, by ``datasets``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data.decode import open_image, pixels_of
from experiments.data.parquet import IMAGE_COLUMNS, LABEL_COLUMNS
from experiments.data.sets import Dataset, batch_bounds, kept_of
from experiments.extras import need

CPU = torch.device("cpu")

# ImageNet's, as nearly everyone has them: of red, green, blue in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Of these, in this order, the first that is there is the test split.
TEST_SPLITS = ("validation", "test")

# Of an image's area, at least so much is in a crop to train on; its sides' ratio at most this.
SCALE, RATIO = 0.08, 4 / 3
# Of an image's shorter side, so much is in the middle part that is evaluated.
MIDDLE = 224 / 256


@dataclass(frozen=True)
class Rows:
    """Images and labels by number, decoded and cropped one at a time: what a DataLoader's workers have.

    Attributes:
        table: a ``datasets.Dataset`` whose images are not decoded.
        image, label: its columns.
        folder: whether images are files that ``table`` has the paths of; else it has their bytes.
        size: side of the square images that come out.
        max_pixels: none of the images that go in may have more.
    """

    table: Any
    image: str
    label: str
    folder: bool
    size: int
    max_pixels: int

    def __getitem__(self, at: tuple[int, int | None]) -> tuple[Tensor, int]:
        """uint8 (3, size, size) and the label of (number, seed); without seed the middle part."""
        number, seed = at
        row = self.table[number]
        cell = row[self.image]
        # A path in a parquet file may be anything: no file is opened for it.
        source = Path(cell["path"]) if self.folder else cell and cell["bytes"]
        try:
            if source is None:
                raise ValueError("has no bytes")
            image = open_image(source, self.max_pixels)
        except ValueError as error:
            where = f"{source}: " if self.folder else ""
            raise ValueError(f"{where}row {number}: the image {error}") from error
        pillow = need("PIL.Image", "pillow", "decoding images")
        if image.mode != "RGB":
            image = image.convert("RGB")
        mirrored = False
        if seed is None:
            box = middle(*image.size)
        else:
            generator = torch.Generator().manual_seed(seed)
            box = random_box(*image.size, generator)
            mirrored = bool(torch.randint(2, (), generator=generator))
        image = image.resize((self.size, self.size), pillow.Resampling.BILINEAR, box)
        if mirrored:
            image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
        return pixels_of(image), row[self.label]

    def together(self, images: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """One batch; of a small last one some process may have no image."""
        if not images:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), torch.empty(0).long()
        return torch.stack([image for image, _ in images]), torch.tensor([y for _, y in images])


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of the square in the middle that is evaluated."""
    side = MIDDLE * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(
    width: int, height: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of a crop of random area, ratio and place (Szegedy et al. 2015).

    If ten in a row do not fit into the image, it is the square in the middle.
    """
    for _ in range(10):
        draws = torch.rand(4, generator=generator).tolist()
        area = width * height * (SCALE + (1 - SCALE) * draws[0])
        ratio = RATIO ** (2 * draws[1] - 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = draws[2] * (width - w), draws[3] * (height - h)
            return left, upper, left + w, upper + h
    return middle(width, height)


@dataclass(frozen=True)
class StreamedSplit:
    """Some rows of a set on disk; has the face of `sets.Split`, but for the images as one tensor.

    Attributes:
        rows: all of the set's.
        numbers: int64 (N,), which of them are this split.
        workers: processes that decode; 0: none, this one does.
        device: where batches go.
        channels_last: their memory format.
    """

    rows: Rows
    numbers: Tensor
    workers: int = 0
    device: torch.device = CPU
    channels_last: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device, channels_last: bool = False) -> StreamedSplit:
        return replace(self, device=device, channels_last=channels_last)

    def batches(
        self,
        batch_size: int,
        order: torch.Generator | None = None,
        *,
        part: tuple[int, int] = (0, 1),
        first: int = 0,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, as `sets.Split.batches`; with an order crops of random size, mirrored or not.

        Every image has a seed of its own, so that the number of workers changes nothing.
        """
        count = len(self)
        numbers, seeds = self.numbers, None
        if order is not None:
            numbers = numbers[torch.randperm(count, generator=order)]
            seeds = torch.randint(2**31, (count,), generator=order)
        return self._pass(numbers, seeds, batch_bounds(count, batch_size, first, drop_last), part)

    def _pass(
        self,
        numbers: Tensor,
        seeds: Tensor | None,
        bounds: Iterator[tuple[int, int]],
        part: tuple[int, int],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def chosen() -> Iterator[list[tuple[int, int | None]]]:
            for start, stop in bounds:
                own = slice(start + part[0], stop, part[1])
                ours = numbers[own].tolist()
                yield list(zip(ours, [None] * len(ours) if seeds is None else seeds[own].tolist()))

        loader = DataLoader(
            self.rows,  # type: ignore[arg-type]
            batch_sampler=chosen(),
            num_workers=self.workers,
            collate_fn=self.rows.together,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # workers' seeds, of no use here, are not drawn from torch's
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        mean, std = (255 * torch.tensor(c, device=self.device)[:, None, None] for c in (MEAN, STD))
        for images, labels in loader:
            x = (images.to(self.device, non_blocking=True) - mean).div_(std)
            yield x.contiguous(memory_format=layout), labels.to(self.device, non_blocking=True)


def load_streamed(
    kind: str,
    data_dir: Path,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    validation_fraction: float = 0.1,
    size: int = 224,
    workers: int = 0,
    max_pixels: int = 2**26,
    cache_dir: str | None = None,
) -> Dataset:
    """A set of large images, of which no more than some batches are in memory.

    Args:
        kind: "folder": ``train/<class>/<image>`` and, beside ``train``, ``val`` (or ``test``);
            "parquet": ``train-*.parquet`` and ``validation-*.parquet`` (or ``test-``).
        data_dir: their folder.
        train_size, test_size: so many images of each; ``None``: all.
        validation_fraction: share of the training images that is kept for choosing settings. A fixed
            permutation decides which, and which are among ``train_size``.
        size: side of the images that come out.
        workers: processes that decode; 0: none, the one that trains does.
        max_pixels: of an image; larger ones are an error, and are not decoded.
        cache_dir: of ``datasets``, which keeps a list of a folder's files there, and all images of
            parquet files; ``None``: its own.

    Raises:
        ImportError: ``datasets`` is not installed.
        FileNotFoundError: no such folder.
        ValueError: what ``datasets`` cannot read; no split to test on; no column of images or of
            labels; a label that is no integer from 0, with its split and row; an empty split.
    """
    for key, value, least in (
        ("size", size, 1),
        ("workers", workers, 0),
        ("max_pixels", max_pixels, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {value!r}: expected an integer from {least}")
    datasets = need("datasets", "datasets", "reading sets of large images", extra="imagenet")
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder")
    splits = {name: sorted(data_dir.glob(f"{name}-*.parquet")) for name in ("train", *TEST_SPLITS)}
    what: dict[str, Any] = {"path": "imagefolder", "data_dir": str(data_dir), "drop_labels": False}
    if kind == "parquet":
        files = {name: list(map(str, found)) for name, found in splits.items() if found}
        if not files:
            raise FileNotFoundError(f"no train-*.parquet in {data_dir}")
        what = {"path": "parquet", "data_files": files}
    try:
        tables = datasets.load_dataset(**what, cache_dir=cache_dir)
    except Exception as error:  # of datasets, arrow and others
        raise ValueError(f"{data_dir}: datasets cannot read it: {error}") from error
    test = next((name for name in TEST_SPLITS if name in tables), None)
    if "train" not in tables or test is None:
        raise ValueError(
            f"{data_dir} has the splits {', '.join(tables)}: expected train, and validation or test"
        )
    parts = []
    highest = 0
    for name in ("train", test):
        image, label = _columns(datasets, tables[name], f"{data_dir}: {name}")
        highest = max(highest, _highest_label(tables[name], label, f"{data_dir}: {name}"))
        table = tables[name].select_columns([image, label])
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        parts.append(Rows(table, image, label, kind == "folder", size, max_pixels))
    generator = torch.Generator().manual_seed(0)
    train, test_numbers = (
        torch.randperm(len(rows.table), generator=generator)[:limit]
        for rows, limit in zip(parts, (train_size, test_size))
    )
    kept = kept_of(str(data_dir), len(train), len(test_numbers), validation_fraction)
    return Dataset(
        kind,
        StreamedSplit(parts[0], train[:kept], workers),
        StreamedSplit(parts[0], train[kept:], workers),
        StreamedSplit(parts[1], test_numbers, workers),
        (3, size, size),
        highest + 1,
    )


def _columns(datasets: Any, table: Any, where: str) -> tuple[str, str]:
    """The names of its columns of images and labels."""
    features = table.features
    image = next((name for name in IMAGE_COLUMNS if name in features), None)
    label = next((name for name in LABEL_COLUMNS if name in features), None)
    if image is None or label is None:
        raise ValueError(
            f"{where} has the columns {', '.join(features)}: expected one of "
            f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
        )
    kind = features[image]
    bytes_of = kind.get("bytes") if isinstance(kind, dict) else None
    if not isinstance(kind, datasets.Image) and bytes_of != datasets.Value("binary"):
        raise ValueError(f"{where}: column {image!r} is {kind}: expected images, or their bytes")
    return image, label


def _highest_label(table: Any, label: str, where: str) -> int:
    """Raises ValueError, naming the row, for a label that is no integer from 0."""
    kind = table.features[label]
    highest = -1
    for row, number in enumerate(table.data.column(label).to_pylist()):
        if type(number) is not int or number < 0:
            raise ValueError(
                f"{where}: row {row}: the label is {number}: expected an integer from 0"
            )
        highest = max(highest, number)
    return max(highest, getattr(kind, "num_classes", 0) - 1)
