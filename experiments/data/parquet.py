"""Whole sets of small images from parquet files, as the public hub has MNIST and CIFAR-10."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.data.decode import decode
from experiments.extras import need

# How a file may name its columns: the hub's names for MNIST and CIFAR-10, as a struct {bytes, path}
# or flattened.
IMAGE_COLUMNS = ("image", "img", "image.bytes", "img.bytes")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Known:
    """A set on the public hub: its name there, the side of its images, its number of classes."""

    hub: str
    side: int
    classes: int = 10


KNOWN = {"mnist": Known("ylecun/mnist", 28), "cifar10": Known("uoft-cs/cifar10", 32)}


def find_parquet(name: str, data_dir: Path, split: str) -> list[Path]:
    """The sorted ``split-*.parquet`` files in ``data_dir`` or a subfolder as the hub has them."""
    folders = [data_dir, data_dir / name, data_dir / "plain_text", data_dir / name / "plain_text"]
    for folder in folders:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return files
    looked = ", ".join(str(folder) for folder in folders)
    missing = "" if data_dir.is_dir() else f" ({data_dir} is not a folder)"
    hub = KNOWN[name].hub if name in KNOWN else name
    raise FileNotFoundError(
        f"no {split}-*.parquet for {name} in any of: {looked}{missing}. Put the parquet files of "
        f"the public hub's dataset {hub} there, or name their folder: data.dir, or a queue's --data-dir"
    )


def read_split(name: str, data_dir: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Up to ``limit`` images, uint8 (N, C, H, W), and labels, int64 (N,), of one of ``KNOWN``.

    Raises FileNotFoundError as `find_parquet`, ValueError as `read_parquet`, and ValueError for
    images of different shapes or none at all.
    """
    known = KNOWN[name]
    images: list[Tensor] = []
    labels: list[int] = []
    for path in find_parquet(name, data_dir, split):
        left = None if limit is None else limit - len(labels)
        if left is not None and left <= 0:
            break
        max_pixels = known.side * known.side
        new = read_parquet(path, left, max_pixels=max_pixels, classes=known.classes)
        images += new[0]
        labels += new[1]
    if not images:
        raise ValueError(f"{name}: the {split} parquet files in {data_dir} hold no images")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"{name}: images of different shapes in {data_dir}: {sorted(shapes)}")
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def read_parquet(
    path: Path, limit: int | None = None, *, max_pixels: int = 32 * 32, classes: int = 10
) -> tuple[list[Tensor], list[int]]:
    """Decodes up to ``limit`` rows of one file into uint8 images (C, H, W) and integer labels.

    Args:
        path: the file.
        limit: read no more rows than this; ``None``: all.
        max_pixels: no image may have more; looked up in its header, before it is decoded.
        classes: labels lie in [0, classes).

    Raises:
        ValueError: names the file, and the row (from 0) where it is one row's fault: no or several
            columns of images or labels, columns of other types, a broken file, a cell without
            image, what is neither PNG nor JPEG, broken or too large; a label that is missing or out
            of range.
    """
    images: list[Tensor] = []
    labels: list[int] = []
    for row, (data, label) in enumerate(_rows(path, limit)):
        try:
            if data is None:
                raise ValueError("has no bytes")
            images.append(decode(data, max_pixels))
        except ValueError as error:
            raise ValueError(f"{path}: row {row}: the image {error}") from error
        if label is None or not 0 <= label < classes:
            raise ValueError(
                f"{path}: row {row}: the label is {label}: expected an integer from 0 to {classes - 1}"
            )
        labels.append(label)
    return images, labels


def _rows(path: Path, limit: int | None) -> Iterator[tuple[bytes | None, int | None]]:
    """(an image's bytes, its label) of each of the first ``limit`` rows."""
    arrow = need("pyarrow", "pyarrow", "reading parquet files")
    parquet = need("pyarrow.parquet", "pyarrow", "reading parquet files")
    with _one_error(path), parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
    image = _column(IMAGE_COLUMNS, schema.names, path, "image")
    label = _column(LABEL_COLUMNS, schema.names, path, "label")
    kind = schema.field(image).type
    in_struct = arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    cells = kind.field("bytes").type if in_struct else kind
    if not (arrow.types.is_binary(cells) or arrow.types.is_large_binary(cells)):
        raise ValueError(f"{path}: column {image!r} is of type {kind}: expected bytes")
    if not arrow.types.is_integer(schema.field(label).type):
        kind = schema.field(label).type
        raise ValueError(f"{path}: column {label!r} is of type {kind}: expected integers")
    wanted = f"{image}.bytes" if in_struct else image
    # As a dictionary, or what a file has once and many rows refer to would be copied for each.
    with _one_error(path):
        file = parquet.ParquetFile(path, read_dictionary=[wanted])
    with file:
        left = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
        batches = file.iter_batches(batch_size=256, columns=[wanted, label])
        while left > 0:
            with _one_error(path):
                batch = next(batches).slice(0, left)
                column = batch[image].field("bytes") if in_struct else batch[image]
            left -= len(batch)
            for cell, number in zip(column, batch[label]):
                with _one_error(path):
                    pair = cell.as_py(), number.as_py()
                yield pair


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # arrow's own, OSError, Unicode's, StopIteration, ...
        what = str(error) or type(error).__name__
        raise ValueError(f"{path}: no parquet file that can be read: {what}") from error


def _column(candidates: Sequence[str], columns: Sequence[str], path: Path, what: str) -> str:
    for name in candidates:
        if columns.count(name) > 1:
            raise ValueError(f"{path}: {columns.count(name)} columns {name!r}: expected one")
        if name in columns:
            return name
    raise ValueError(
        f"{path}: no {what} column; looked for {', '.join(candidates)}, found {', '.join(columns)}"
    )
