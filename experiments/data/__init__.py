"""Real images, in three splits, as batches of tensors."""

from __future__ import annotations

from experiments.data.augment import Augment
from experiments.data.load import DATASETS, DIGITS_TEST, IN_MEMORY, load
from experiments.data.parquet import find_parquet, read_parquet
from experiments.data.sets import Dataset, Split
from experiments.data.streamed import StreamedSplit

__all__ = [
    "DATASETS",
    "DIGITS_TEST",
    "IN_MEMORY",
    "Augment",
    "Dataset",
    "Split",
    "StreamedSplit",
    "find_parquet",
    "load",
    "read_parquet",
]
