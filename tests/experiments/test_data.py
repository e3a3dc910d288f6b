"""experiments/data: parquet files, decoding, splits, batches; what is wrong is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import bomb, encoded, make_parquet, noise

from experiments.data import DIGITS_TEST, load, read_parquet
from experiments.data.decode import decode
from experiments.data.parquet import read_split
from experiments.extras import need

pytest.importorskip("sklearn")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")

import pyarrow.parquet as pq  # noqa: E402


@pytest.mark.parametrize("column", ["image", "img", "image.bytes"])
def test_parquet_gives_back_the_pixels(tmp_path: Path, column: str) -> None:
    pixels = torch.randint(0, 256, (5, 6, 4, 3), dtype=torch.uint8)
    make_parquet(tmp_path / "a.parquet", [encoded(p) for p in pixels], [3, 1, 4, 1, 5], column)
    images, labels = read_parquet(tmp_path / "a.parquet")
    assert labels == [3, 1, 4, 1, 5]
    assert torch.equal(torch.stack(images), pixels.permute(0, 3, 1, 2))
    images, labels = read_parquet(tmp_path / "a.parquet", limit=2)
    assert labels == [3, 1]
    assert len(images) == 2


def test_loading_joins_shards_in_order_and_splits_off_the_last_for_validation(
    tmp_path: Path,
) -> None:
    pixels = torch.randint(0, 256, (14, 5, 5), dtype=torch.uint8)
    files = [encoded(p) for p in pixels]
    folder = tmp_path / "mnist"
    folder.mkdir()
    make_parquet(folder / "train-00001-of-00002.parquet", files[6:10], [6, 7, 8, 9], "image")
    make_parquet(folder / "train-00000-of-00002.parquet", files[:6], [0, 1, 2, 3, 4, 5], "image")
    make_parquet(folder / "test-00000-of-00001.parquet", files[10:], [1, 2, 3, 4], "image")
    loaded = load("mnist", tmp_path, validation_fraction=0.2)
    assert loaded.train.y.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert loaded.validation.y.tolist() == [8, 9]
    assert loaded.test.y.tolist() == [1, 2, 3, 4]
    assert loaded.image_shape == (1, 5, 5)
    # Normalised by the training split alone.
    raw = pixels.float().unsqueeze(1) / 255
    mean, std = raw[:8].mean(), raw[:8].std()
    torch.testing.assert_close(loaded.train.x, (raw[:8] - mean) / std)
    torch.testing.assert_close(loaded.test.x, (raw[10:] - mean) / std)
    limited = load("mnist", tmp_path, train_size=7, test_size=2, validation_fraction=0.2)
    assert limited.train.y.tolist() + limited.validation.y.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert limited.test.y.tolist() == [1, 2]


def test_missing_data_names_every_place_that_was_looked_at(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", tmp_path / "nowhere")
    text = str(error.value)
    assert "train-*.parquet" in text
    assert str(tmp_path / "nowhere") in text
    assert str(tmp_path / "nowhere" / "cifar10") in text
    assert "not a folder" in text
    assert "uoft-cs/cifar10" in text


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pyarrow.table({"picture": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no image column.*found picture, label"):
        read_parquet(tmp_path / "a.parquet")


def test_digits_are_split_without_overlap_and_the_same_every_time() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train.x, second.train.x)
    sizes = len(first.train), len(first.validation), len(first.test)
    assert sum(sizes) == 1797
    assert sizes[2] == DIGITS_TEST
    assert first.image_shape == (1, 8, 8)
    assert abs(first.train.x.mean().item()) < 1e-5
    # Every class is in every split.
    for split in (first.train, first.validation, first.test):
        assert split.y.unique().numel() == 10


def test_empty_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="split empty"):
        load("digits", train_size=1)
    with pytest.raises(ValueError, match="'imagenet'"):
        load("imagenet")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*dbp-kernels\[experiments\]"):
        need("sklearn.datasets", "scikit-learn", "the digits images")


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPS", "BMP", "GIF", "TIFF", "PPM", "WEBP", "ICO"])
def test_nothing_but_png_and_jpeg_is_decoded(kind: str) -> None:
    with pytest.raises(ValueError, match="expected PNG or JPEG"):
        decode(noise(16, 16, kind), 1024)


def test_an_image_too_large_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match=r"has 8000x8000 pixels: expected at most 1024 in all"):
        decode(bomb(8000, 8000), 1024)


def test_modes_become_one_or_three_channels_of_8_bits_or_are_refused() -> None:
    import io

    from PIL import Image

    def saved(mode: str, kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (4, 3), 1).save(buffer, kind)
        return buffer.getvalue()

    for mode in ("L", "P", "RGB", "RGBA", "1", "LA"):
        assert decode(saved(mode, "PNG"), 12).shape == (1 if mode == "L" else 3, 3, 4)
    for mode in ("L", "RGB", "CMYK"):
        assert decode(saved(mode, "JPEG"), 12).shape == (1 if mode == "L" else 3, 3, 4)
    with pytest.raises(ValueError, match="mode I;16: expected 8 bits"):
        decode(saved("I;16", "PNG"), 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_cut_short_names_file_and_row(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    whole = noise(6, 5, kind)
    for length in (0, 3, 30, len(whole) // 2, len(whole) - 30):
        make_parquet(path, [whole, whole[:length]], [0, 1])
        with pytest.raises(ValueError, match=r"a\.parquet: row 1: the image (cannot|is no image)"):
            read_parquet(path)


def test_a_bomb_in_a_parquet_file_is_refused_by_its_row(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train-0.parquet", [noise(28, 28), bomb(8000, 8000)], [0, 1])
    with pytest.raises(
        ValueError, match=r"train-0\.parquet: row 1: the image has 8000x8000 pixels"
    ):
        load("mnist", tmp_path)
    make_parquet(tmp_path / "train-0.parquet", [noise(32, 32)], [0])
    with pytest.raises(
        ValueError, match=r"row 0: the image has 32x32 pixels: expected at most 784"
    ):
        load("mnist", tmp_path)


def test_what_a_file_has_once_is_not_copied_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cell = noise(4, 4) + bytes(20_000_000)
    for column in ("image", "img.bytes"):
        make_parquet(path, [noise(4, 4), cell], [0, 1], column)
        with pytest.raises(ValueError, match=r"row 1: the image has 20\d+ bytes: expected at most"):
            read_parquet(path)
    rows = pyarrow.DictionaryArray.from_arrays([0] * 2000, pyarrow.array([cell]))
    table = pyarrow.table({"image.bytes": rows, "label": [0] * 2000})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    before = pyarrow.default_memory_pool().max_memory()  # 40 GB otherwise
    with pytest.raises(ValueError, match=r"row 0: the image has 20\d+ bytes: expected at most"):
        read_parquet(path)
    assert pyarrow.default_memory_pool().max_memory() - before < 10 * len(cell)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], "row 1: the label is 10: expected an integer from 0 to 9"),
        ([-1, 0], "row 0: the label is -1"),
        ([0, None], "row 1: the label is None"),
        ([0.0, 1.0], "column 'label' is of type double: expected integers"),
        (["a", "b"], "column 'label' is of type string: expected integers"),
        ([True, False], "column 'label' is of type bool: expected integers"),
        ([2**62, 0], f"row 0: the label is {2**62}"),
    ],
)
def test_labels_are_integers_in_range(tmp_path: Path, labels: list, message: str) -> None:
    make_parquet(tmp_path / "a.parquet", [noise(4, 4)] * 2, labels)
    with pytest.raises(ValueError, match=rf"a\.parquet: {message}"):
        read_parquet(tmp_path / "a.parquet")


def test_cells_without_an_image_and_columns_of_other_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for column in ("image", "img.bytes"):
        make_parquet(path, [noise(4, 4), None], [0, 1], column)
        with pytest.raises(ValueError, match=r"a\.parquet: row 1: the image has no bytes"):
            read_parquet(path)
    # A path is not followed.
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (tmp_path / "secret.png").write_bytes(noise(4, 4))
    for cell in ({"bytes": None, "path": str(tmp_path / "secret.png")}, None):
        pq.write_table(pyarrow.table({"image": pyarrow.array([cell], struct), "label": [1]}), path)
        with pytest.raises(ValueError, match="row 0: the image has no bytes"):
            read_parquet(path)
    for column in (["text"], [1], [[b"x"]], [{"path": "x"}]):
        pq.write_table(pyarrow.table({"image": column, "label": [1]}), path)
        with pytest.raises(ValueError, match=r"column 'image' is of type .*: expected bytes"):
            read_parquet(path)
    twice = pyarrow.table([[b"x"], [b"y"], [1]], names=["image.bytes", "image.bytes", "label"])
    pq.write_table(twice, path)
    with pytest.raises(ValueError, match=r"2 columns 'image\.bytes': expected one"):
        read_parquet(path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    make_parquet(path, [noise(4, 4)] * 3, [0, 1, 2])
    whole = path.read_bytes()
    for part in (b"", b"PAR1", whole[:100], whole[50:], b"x" * 500):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"train-0\.parquet: no parquet file that can be read"):
            load("mnist", tmp_path)


def test_files_are_decoded_once_as_long_as_they_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        files = [noise(5, 4, seed=i) for i in range(4)]
        make_parquet(tmp_path / f"{split}-0.parquet", files, [0, 1, 2, 3])
    read: list[str] = []

    def counted(name: str, folder: Path, split: str, limit: int | None) -> Any:
        read.append(split)
        return read_split(name, folder, split, limit)

    monkeypatch.setattr(sys.modules[load.__module__], "read_split", counted)
    first = load("cifar10", tmp_path, validation_fraction=0.25)
    again = load("cifar10", tmp_path, validation_fraction=0.25)
    assert torch.equal(first.train.images, again.train.images)
    assert read == ["train", "test"]
    assert len(load("cifar10", tmp_path, validation_fraction=0.5).train) == 2
    other = [noise(5, 4, seed=i) for i in range(10, 15)]
    make_parquet(tmp_path / "test-0.parquet", other, [4] * 5)
    assert load("cifar10", tmp_path, validation_fraction=0.5).test.y.tolist() == [4] * 5


# --- batches ------------------------------------------------------------------------------------


def test_a_set_is_held_as_bytes_and_moves_as_one() -> None:
    loaded = load("digits")
    assert loaded.train.images.dtype == torch.uint8
    moved = loaded.to(torch.device("meta"), channels_last=True)
    assert {s.images.device.type for s in (moved.train, moved.validation, moved.test)} == {"meta"}


def test_batches_have_the_memory_format_that_was_asked_for(tmp_path: Path) -> None:
    for split in ("train", "test"):
        files = [noise(5, 4, seed=i) for i in range(4)]
        make_parquet(tmp_path / f"{split}-0.parquet", files, [0] * 4)
    loaded = load("cifar10", tmp_path, validation_fraction=0.25, augment=["crop:2"])
    for channels_last in (False, True):
        train = loaded.to(torch.device("cpu"), channels_last).train
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for x in (next(train.batches(3))[0], next(train.batches(3, torch.Generator()))[0], train.x):
            assert x.is_contiguous(memory_format=layout)


def test_batches_in_order_are_the_whole_split_normalised() -> None:
    train = load("digits").train
    batches = list(train.batches(100))
    assert [len(y) for _, y in batches] == [100] * 12 + [len(train) - 1200]
    assert torch.equal(torch.cat([x for x, _ in batches]), train.x)
    assert torch.equal(torch.cat([y for _, y in batches]), train.y)
    assert [len(y) for _, y in train.batches(100, drop_last=True)] == [100] * 12
    assert [len(y) for _, y in train.batches(len(train), drop_last=True)] == [len(train)]


def test_an_order_is_a_permutation_that_the_generator_decides() -> None:
    train = load("digits").train
    one, other = (list(train.batches(64, torch.Generator().manual_seed(s))) for s in (1, 2))
    again = list(train.batches(64, torch.Generator().manual_seed(1)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, again))
    assert not torch.equal(one[0][0], other[0][0])
    for batches in (one, other):
        x = torch.cat([x for x, _ in batches]).flatten(1)
        assert torch.equal(x.sum(1).sort().values, train.x.flatten(1).sum(1).sort().values)


def test_a_pass_goes_on_where_it_was_interrupted() -> None:
    train = load("digits", augment=["crop:2", "flip", "cutout:3"]).train
    generator = torch.Generator().manual_seed(3)
    list(train.batches(50, generator))
    state = generator.get_state()
    whole = list(train.batches(50, generator))
    after = generator.get_state()
    generator.set_state(state)
    rest = list(train.batches(50, generator, first=7))
    assert torch.equal(generator.get_state(), after)
    assert len(rest) == len(whole) - 7
    for (x, y), (x2, y2) in zip(whole[7:], rest):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_what_a_pass_draws_is_drawn_by_the_call() -> None:
    train = load("digits", augment=["crop:2", "flip", "cutout:3"]).train
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    batches = train.batches(50, generator)
    drawn = generator.get_state()
    assert not torch.equal(before, drawn)
    list(batches)
    assert torch.equal(generator.get_state(), drawn)


def test_processes_share_each_batch() -> None:
    train = load("digits", augment=["crop:1"]).train
    whole = list(train.batches(64, torch.Generator().manual_seed(0)))
    parts = [
        list(train.batches(64, torch.Generator().manual_seed(0), part=(r, 3))) for r in range(3)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for (x, y), *shares in zip(whole, *parts):
        for rank, (own_x, own_y) in enumerate(shares):
            assert torch.equal(own_x, x[rank::3])
            assert torch.equal(own_y, y[rank::3])


def test_pixels_between_0_and_1_on_demand() -> None:
    train = load("digits", normalise=False).train
    assert (train.x.min().item(), train.x.max().item()) == (0, 1)
    with pytest.raises(ValueError, match=r"digits has no option 'width' \(got 3\)"):
        load("digits", width=3)


def test_a_channel_of_one_value_is_zero(tmp_path: Path) -> None:
    pixels = torch.randint(256, (10, 4, 4, 3), dtype=torch.uint8)
    pixels[..., 1] = 7
    for split in ("train", "test"):
        make_parquet(tmp_path / f"{split}-0.parquet", [encoded(p) for p in pixels], [0] * 10)
    x = load("cifar10", tmp_path, validation_fraction=0.2).train.x
    assert x[:, 1].eq(0).all()
    assert x.isfinite().all()


def test_digits_may_be_enlarged():
    small, large = load("digits"), load("digits", size=20)
    assert large.image_shape == (1, 20, 20)
    assert torch.equal(small.train.y, large.train.y)
    expected = torch.nn.functional.interpolate(
        small.train.images[:5].double(), size=(20, 20), mode="bilinear"
    )
    assert (large.train.images[:5] - expected).abs().max() <= 1  # both are rounded


@pytest.mark.parametrize("size", [7, 65, 16.0, "16", True])
def test_digits_of_no_such_size(size):
    with pytest.raises(ValueError, match="size of digits"):
        load("digits", size=size)
