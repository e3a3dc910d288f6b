"""experiments/data/streamed: folders of images and parquet files, read batch by batch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from image_files import bomb, encoded, make_parquet, noise

from experiments.data import StreamedSplit, load
from experiments.data.streamed import MEAN, STD, middle, random_box

CLASSES = ("cat", "dog", "emu")


def test_without_datasets_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"large images needs datasets.*dbp-kernels\[imagenet\]"):
        load("folder", tmp_path)


def test_crops_lie_within_the_image_and_keep_area_and_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    areas, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = random_box(300, 200, generator)
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 200
        areas.append((right - left) * (lower - upper) / 60_000)
        ratios.append((right - left) / (lower - upper))
    assert 0.08 <= min(areas) < 0.1
    assert 0.85 < max(areas) <= 8 / 9  # of 300 x 200 pixels the ratio leaves no more
    assert min(ratios) + 1e-9 >= 3 / 4
    assert max(ratios) - 1e-9 <= 4 / 3
    assert random_box(1, 1000, generator) == middle(1, 1000)
    assert middle(320, 256) == (48, 16, 272, 240)  # 224 pixels of an image of 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("datasets")
    root = tmp_path / "set"
    for split, count in (("train", 10), ("val", 2)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                # Of one colour, which no crop changes: green is the class, red the image.
                pixels = torch.zeros(20 + i, 30, 3, dtype=torch.uint8)
                pixels[..., 0], pixels[..., 1] = 10 * i, 80 * number
                (root / split / name / f"{i}.png").write_bytes(encoded(pixels))
    return root


def loaded(root: Path, kind: str = "folder", **options):
    return load(kind, root, size=8, cache_dir=str(root.parent / "cache"), **options)


def colours(x: torch.Tensor) -> torch.Tensor:
    """The pixels' values again."""
    mean, std = (torch.tensor(c)[:, None, None] for c in (MEAN, STD))
    return ((x * std + mean) * 255).round()


def test_a_folder_is_three_splits_that_share_no_image(folder: Path) -> None:
    data = loaded(folder, validation_fraction=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 6)
    assert (data.image_shape, data.num_classes) == ((3, 8, 8), 3)
    seen = []
    for split in (data.train, data.validation):
        for x, y in split.batches(5):
            pixels = colours(x)
            assert torch.equal(pixels, pixels[:, :, :1, :1].expand_as(pixels))
            assert torch.equal(pixels[:, 1, 0, 0], 80.0 * y)
            seen += [(red, label) for red, label in zip(pixels[:, 0, 0, 0].tolist(), y.tolist())]
        assert len({label for _, label in seen}) == 3  # validation is no class of its own
    assert sorted(seen) == sorted((10.0 * i, label) for i in range(10) for label in range(3))
    few = loaded(folder, train_size=10, test_size=4, validation_fraction=0.2)
    assert (len(few.train), len(few.validation), len(few.test)) == (8, 2, 4)


def wide(root: Path) -> StreamedSplit:
    """A training split of noise, of which crops differ."""
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                (root / split / name / f"{i}.jpg").write_bytes(noise(20, 30, "JPEG", i))
    return loaded(root).train


def test_batches_are_the_same_from_any_number_of_workers_and_in_the_middle(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    split = wide(tmp_path / "set")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    whole = list(split.batches(4, generator))
    assert torch.equal(torch.get_rng_state(), before)
    next_pass = list(split.batches(4, generator))
    assert not torch.equal(whole[0][0], next_pass[0][0])
    two = dataclasses.replace(split, workers=2)
    for other in (
        list(two.batches(4, torch.Generator().manual_seed(1), first=2)),
        list(split.batches(4, torch.Generator().manual_seed(1), first=2)),
    ):
        assert len(other) == len(whole) - 2
        for (x, y), (x2, y2) in zip(whole[2:], other):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    parts = [
        list(split.batches(4, torch.Generator().manual_seed(1), part=(r, 2), drop_last=True))
        for r in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == len(split) // 4
    for (x, _), *shares in zip(whole, *parts):
        for rank, (own, _) in enumerate(shares):
            assert torch.equal(own, x[rank::2])
    # 22 images in batches of 7: one is left over, which the second process has no part of.
    assert [len(y) for _, y in split.batches(7, part=(1, 2))] == [3, 3, 3, 0]
    moved = split.to(torch.device("cpu"), channels_last=True)
    assert next(moved.batches(4))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("hub", [False, True])
def test_parquet_files(tmp_path: Path, hub: bool) -> None:
    datasets = pytest.importorskip("datasets")
    root = tmp_path / "set"
    root.mkdir()
    files = [encoded(torch.full((9, 12, 3), 20 * i, dtype=torch.uint8)) for i in range(10)]
    labels = [i % 4 for i in range(10)]
    for name, part in (("train-00000-of-1", slice(10)), ("validation-00000-of-1", slice(3))):
        path = root / f"{name}.parquet"
        make_parquet(path, files[part], labels[part])
        if hub:  # where the column is said to be of images
            table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hub"))
            table.cast_column("image", datasets.Image()).to_parquet(path)
    data = loaded(root, "parquet", validation_fraction=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 3)
    assert data.num_classes == 4
    for split in (data.train, data.validation, data.test):
        for x, y in split.batches(3, torch.Generator()):
            number = colours(x)[:, 0, 0, 0] / 20
            assert torch.equal(number % 4, y.float())


def test_a_bad_image_names_file_and_row(folder: Path) -> None:
    data = loaded(folder, validation_fraction=0.2)
    both = torch.cat([data.train.numbers, data.validation.numbers])
    for content, message, workers in (
        (noise(8, 8, "EPS"), "is no image that can be read: expected PNG or JPEG", 0),
        (bomb(9000, 9000), "has 9000x9000 pixels: expected at most", 0),
        (noise(8, 8)[:-60], "cannot be decoded", 1),
    ):
        (folder / "train" / "dog" / "3.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"dog/3\.png: row 13: the image {message}"):
            list(StreamedSplit(data.train.rows, both, workers).batches(4))


def test_a_parquet_cells_path_is_never_opened(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = tmp_path / "set"
    root.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(noise(8, 8))
    for name in ("train", "validation"):
        paths = [str(secret)] * 10
        make_parquet(root / f"{name}-0.parquet", [None] * 10, [0] * 10, paths=paths)
    with pytest.raises(ValueError, match=r"row \d: the image has no bytes"):
        next(loaded(root, "parquet").train.batches(4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], "train: row 2: the label is -1: expected an integer from 0"),
        ([0, None, 1], "train: row 1: the label is None"),
        ([0.0, 1.5, 1.0], "train: row 0: the label is 0.0"),
        (["a", "b", "c"], "train: row 0: the label is a"),
    ],
)
def test_labels_are_integers(tmp_path: Path, labels: list, message: str) -> None:
    pytest.importorskip("datasets")
    root = tmp_path / "set"
    root.mkdir()
    for name in ("train", "validation"):
        make_parquet(root / f"{name}-0.parquet", [noise(4, 4)] * 3, labels)
    with pytest.raises(ValueError, match=message):
        loaded(root, "parquet")


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        loaded(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train-\*\.parquet in"):
        loaded(folder, "parquet")
    with pytest.raises(ValueError, match="has the splits train: expected train, and validation"):
        loaded(folder / "train")
    with pytest.raises(ValueError, match=r"folder always has random crops.*got \['flip'\]"):
        loaded(folder, augment=["flip"])
    with pytest.raises(ValueError, match="folder has no option 'normalise'"):
        loaded(folder, normalise=False)
    with pytest.raises(ValueError, match="workers is -1: expected an integer from 0"):
        loaded(folder, workers=-1)
    with pytest.raises(ValueError, match="leave a split empty"):
        loaded(folder, train_size=1)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train-0.parquet").write_bytes(b"PAR1xxxxPAR1")
    with pytest.raises(ValueError, match="bad: datasets cannot read it"):
        loaded(bad, "parquet")
