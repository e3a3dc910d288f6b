"""Broken and malicious image files: they are read as what they are, or refused by one error."""

import functools
import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import bomb, make_parquet, noise

from experiments.data import read_parquet
from experiments.data.streamed import Rows

pyarrow = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")
resource = pytest.importorskip("resource")

import pyarrow.parquet as pq  # noqa: E402

SIDE = 24
OTHERS = (
    "EPS",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "WEBP",
    "ICO",
    "TGA",
    "PCX",
    "SGI",
    "DDS",
    "PDF",
)

# What all cases of a test together may add to the most memory the process ever had. One image of
# 8000 x 8000 grey pixels has as much.
MEMORY = 64 << 20
MEGABYTES = (1, 2, 100)


def whole(rng: random.Random) -> bytes:
    """A good PNG or JPEG file of at most SIDE x SIDE pixels."""
    kind = rng.choice(("PNG", "JPEG"))
    return noise(rng.randint(1, SIDE), rng.randint(1, SIDE), kind, rng.randrange(100))


def cut(rng: random.Random) -> bytes:
    data = whole(rng)
    return data[: rng.randrange(len(data))]


def changed(rng: random.Random) -> bytes:
    data = bytearray(whole(rng))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def shifted(rng: random.Random) -> bytes:
    data = whole(rng)
    at, to = (rng.randrange(len(data)) for _ in range(2))
    return data[:at] + data[to:]


def random_bytes(rng: random.Random) -> bytes:
    start = rng.choice(
        (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0 EPSF-3.0\n")
    )
    return start + rng.randbytes(rng.randrange(400))


def other_format(rng: random.Random) -> bytes:
    return noise(8, 8, rng.choice(OTHERS))


def other_mode(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    mode, kind = rng.choice(
        [(m, "PNG") for m in ("1", "L", "LA", "P", "RGBA", "I;16")] + [("CMYK", "JPEG")]
    )
    Image.new(mode, (rng.randint(1, SIDE), 5), 1).save(buffer, kind)
    return buffer.getvalue()


def png_header(rng: random.Random) -> bytes:
    """Another size, depth or colour type in the header, whose sum is right again."""
    data = bytearray(noise(8, 8))
    if rng.random() < 0.6:
        sides = [rng.choice((0, 1, 9, SIDE, 70_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        data[16:24] = struct.pack(">II", *sides)
    else:
        data[24 + rng.randrange(5)] = rng.randrange(256)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg_header(rng: random.Random) -> bytes:
    """Other sides in the frame's header."""
    data = bytearray(noise(8, 8, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", *(rng.choice((0, 1, 9, 8000, 65_535)) for _ in range(2)))
    return bytes(data)


@functools.cache
def compressed_text(megabytes: int) -> bytes:
    """A PNG's chunk with a comment of so many megabytes."""
    text = b"zTXt" + b"k\0\0" + zlib.compress(bytes(megabytes << 20))
    return struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))


def much_text(rng: random.Random) -> bytes:
    data = noise(8, 8)
    return data[:33] + compressed_text(rng.choice(MEGABYTES)) + data[33:]


MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    whole,
    cut,
    changed,
    shifted,
    random_bytes,
    other_format,
    other_mode,
    png_header,
    jpeg_header,
    much_text,
)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch):
    """No process is started (EPS would start Ghostscript), and memory stays bounded."""

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    for megabytes in MEGABYTES:  # what takes memory of its own to make
        compressed_text(megabytes)
    before = peak()
    yield
    assert peak() - before < MEMORY


def peak() -> int:
    """The most bytes of memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read(path: Path) -> tuple[list[torch.Tensor], list[int]] | str:
    """What is in the file, which is as it must be; or the error, which must name the file."""
    try:
        images, labels = read_parquet(path, max_pixels=SIDE * SIDE)
    except ValueError as error:
        said = str(error)
    else:
        check(images, labels)
        return images, labels
    assert said.startswith(f"{path}: ")
    return said


def check(images: list[torch.Tensor], labels: list[int]) -> None:
    assert len(images) == len(labels)
    for image in images:
        assert image.dtype == torch.uint8
        assert image.shape[0] in (1, 3)
        assert 1 <= image.shape[1] * image.shape[2] <= SIDE * SIDE
    assert all(type(label) is int and 0 <= label < 10 for label in labels)


@pytest.mark.kind("image files")
def test_broken_images_are_read_or_refused(campaign, guarded, tmp_path):
    path = tmp_path / "a.parquet"
    for rng in campaign.cases(1000):
        maker = rng.choice(MAKERS)
        make_parquet(path, [noise(4, 4), maker(rng)], [1, 2])
        result = read(path)
        assert isinstance(result, tuple) or ": row 1: the image " in result
        if maker is whole:
            assert len(result) == 2
        elif maker in (other_format, random_bytes):
            assert "expected PNG or JPEG" in result or "cannot be decoded" in result


@pytest.mark.kind("image files")
def test_bombs_are_not_decoded(campaign, guarded, tmp_path):
    path = tmp_path / "a.parquet"
    squares = [bomb(side, side) for side in (SIDE + 1, 1000, 8000)]
    stripes = [bomb(1, SIDE * SIDE + 1), bomb(30_000, 1), bomb(2, 20_000)]
    for rng in campaign.cases(200):
        images = [noise(4, 4)] * rng.randrange(4) + rng.choices(squares + stripes, k=10)
        make_parquet(path, images, [0] * len(images))
        assert f"pixels: expected at most {SIDE * SIDE} in all" in read(path)


@pytest.mark.kind("image files")
def test_labels_are_integers_in_range_or_refused(campaign, guarded, tmp_path):
    path = tmp_path / "a.parquet"
    kinds = ("int8", "int32", "int64", "uint8", "uint64", "float32", "float64", "bool_", "string")
    for rng in campaign.cases(400):
        kind = rng.choice(kinds)
        values = [rng.choice((0, 1, 2, 9, 10, 11, 100)) for _ in range(rng.randint(1, 5))]
        if kind.startswith("int"):
            values[0] = rng.choice((-1, -100, *values))
        good = "int" in kind and all(0 <= value <= 9 for value in values)
        given = [bool(v) if kind == "bool_" else str(v) if kind == "string" else v for v in values]
        if rng.random() < 0.2:
            given[-1], good = None, False
        labels = pyarrow.array(given, getattr(pyarrow, kind)())
        make_parquet(path, [noise(3, 3)] * len(values), labels)
        result = read(path)
        assert isinstance(result, tuple) == good
        if good:
            assert result[1] == values
        else:
            assert "label" in result


@pytest.mark.kind("image files")
def test_broken_parquet_files_are_read_or_refused(campaign, guarded, tmp_path):
    path = tmp_path / "a.parquet"
    good = []
    for column in ("image", "img.bytes"):
        images = [noise(8, 8, kind, seed) for seed, kind in enumerate(["PNG", "JPEG"] * 8)]
        make_parquet(path, images, [seed % 10 for seed in range(16)], column)
        good.append(path.read_bytes())
    for rng in campaign.cases(2500):
        data = bytearray(rng.choice(good))
        footer = int.from_bytes(data[-8:-4], "little") + 8
        how = rng.choice(("cut", "anywhere", "footer", "left out", "put in"))
        at = rng.randrange(len(data))
        if how == "cut":
            del data[at:]
        elif how == "left out":
            del data[at : at + rng.randint(1, 50)]
        elif how == "put in":
            data[at:at] = rng.randbytes(rng.randint(1, 50))
        else:
            for _ in range(rng.randint(1, 4)):
                end = len(data) if how == "anywhere" else footer
                data[-rng.randint(1, end)] = rng.randrange(256)
        path.write_bytes(data)
        read(path)


@pytest.mark.kind("image files")
def test_columns_of_any_type_are_read_or_refused(campaign, guarded, tmp_path):
    path = tmp_path / "a.parquet"
    image = noise(3, 3)
    columns = (
        pyarrow.array([image]),
        pyarrow.array([image], pyarrow.large_binary()),
        pyarrow.array([{"bytes": image, "path": "/etc/passwd"}]),
        pyarrow.array([{"bytes": None, "path": "/etc/passwd"}]),
        pyarrow.array([None], pyarrow.struct([("bytes", pyarrow.binary())])),
        pyarrow.array([{"bytes": {"bytes": image}}]),
        pyarrow.array([{"path": "/etc/passwd"}]),
        pyarrow.array([[image]]),
        pyarrow.array(["text"]),
        pyarrow.array([image[:16]], pyarrow.binary(16)),
        pyarrow.array([3]),
        pyarrow.array([None]),
    )
    names = ("image", "img", "image.bytes", "img.bytes", "picture", "label", "labels")
    for rng in campaign.cases(300):
        count = rng.randint(1, 4)
        chosen = {
            rng.choice(names): rng.choice((*columns, pyarrow.array([7]))) for _ in range(count)
        }
        chosen["label"] = rng.choice((pyarrow.array([7]), *columns))
        pq.write_table(pyarrow.table(chosen), path)
        result = read(path)
        assert isinstance(result, str) or result[1] in ([7], [3])


@pytest.mark.kind("image files")
@pytest.mark.parametrize("folder", [False, True])
def test_broken_images_of_large_sets_are_read_or_refused(campaign, guarded, tmp_path, folder):
    path = tmp_path / "a.png"
    for rng in campaign.cases(500):
        data = rng.choice(MAKERS)(rng)
        path.write_bytes(data)
        cell = {"bytes": None, "path": str(path)} if folder else {"bytes": data, "path": "/x"}
        rows = Rows([{"image": cell, "label": 3}], "image", "label", folder, 7, SIDE * SIDE)
        seed = rng.choice((None, rng.randrange(2**31)))
        said = ""
        try:
            image, label = rows[0, seed]
        except ValueError as error:
            said = str(error)
        if said:
            assert "row 0: the image " in said
            assert (str(path) in said) == folder
        else:
            assert (image.dtype, tuple(image.shape), label) == (torch.uint8, (3, 7, 7), 3)
