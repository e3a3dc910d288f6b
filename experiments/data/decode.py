"""PNG and JPEG files as tensors. They may come from anywhere: nothing else is decoded, and no
image larger than was asked for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from experiments.extras import need

# Of Pillow's some forty formats. EPS would start Ghostscript.
FORMATS = ("PNG", "JPEG")

# Pillow's modes of 8 bits per channel. Of 16 bits it would keep the lower ones.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def open_image(source: bytes | Path, max_pixels: int) -> Any:
    """The decoded PIL.Image of a PNG or JPEG, whose header is looked at first.

    Raises ValueError if it is neither, has more than ``max_pixels`` pixels or more than 8 bits per
    channel, is broken, cut short or not there. (What a JPEG's pixels should be nothing can tell.)
    """
    pillow = need("PIL.Image", "pillow", "decoding images")
    with _one_error(pillow):
        image = pillow.open(
            source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS
        )
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"has {width}x{height} pixels: expected at most {max_pixels} in all")
        if image.mode not in MODES:
            raise ValueError(f"has Pillow's mode {image.mode}: expected 8 bits per channel")
        with _one_error(pillow):
            image.load()
    return image


@contextlib.contextmanager
def _one_error(pillow: ModuleType) -> Iterator[None]:
    try:
        yield
    except pillow.UnidentifiedImageError as error:
        raise ValueError("is no image that can be read: expected PNG or JPEG") from error
    except Exception as error:  # of a decoder: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error


def pixels_of(image: Any) -> Tensor:
    """A PIL.Image of mode L or RGB -> uint8 (C, H, W)."""
    channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def decode(data: bytes, max_pixels: int) -> Tensor:
    """PNG or JPEG bytes -> uint8 (C, H, W); greyscale has one channel, everything else three.

    Raises ValueError as `open_image` does, and for far more bytes than so few pixels need.
    """
    most = 2**16 + 8 * max_pixels  # of what is said about an image, and of its channels
    if len(data) > most:
        raise ValueError(f"has {len(data)} bytes: expected at most {most}")
    image = open_image(data, max_pixels)
    return pixels_of(image if image.mode in ("L", "RGB") else image.convert("RGB"))
