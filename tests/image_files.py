"""Encoded images, and parquet files and folders of them, for tests."""

import io
import struct
import zlib
from pathlib import Path

import torch


def encoded(pixels: torch.Tensor, kind: str = "PNG") -> bytes:
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG, JPEG, BMP, ... file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format=kind)
    return buffer.getvalue()


def noise(height: int, width: int, kind: str = "PNG", seed: int = 0) -> bytes:
    """The bytes of a file of so many random pixels in colour."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return encoded(pixels, kind)


def bomb(height: int, width: int) -> bytes:
    """A valid PNG of grey zeros: a thousand times smaller than what it decodes to."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    compressor = zlib.compressobj(9)
    row = bytes(1 + width)
    data = b"".join([*(compressor.compress(row) for _ in range(height)), compressor.flush()])
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_parquet(
    path: Path, images: list, labels: list, column: str = "image", paths: list | None = None
) -> None:
    """A hub-like file: ``column`` is a struct {bytes, path}, or raw bytes if its name has a dot."""
    import pyarrow
    import pyarrow.parquet as pq

    if "." in column:
        cells = pyarrow.array(images, pyarrow.binary())
    else:
        struct_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        rows = zip(images, paths or [None] * len(images))
        cells = pyarrow.array([{"bytes": b, "path": p} for b, p in rows], struct_type)
    pq.write_table(pyarrow.table({column: cells, "label": labels}), path)
