"""Files of images for tests, and what is said of bad ones."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ktg_jax.errors import InputError


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save_image(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_split(split: Path, per_class: int = 2, classes: str = "ab", seed: int = 0) -> None:
    """Random 8x8 images, `0.png`, `1.png`, ... of each class, different for each."""
    for i, name in enumerate(classes):
        for j, pixels in enumerate(random_images(per_class, 8, 8, 3, seed=100 * seed + i)):
            save_image(split / name / f"{j}.png", pixels)


def png(width: int, height: int, *, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG file of uncompressed rows, each with its filter byte, of whatever is in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def assert_input_error(error: InputError, field: str, *parts: str) -> None:
    assert error.field == field
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)
