"""Decoding image files and resizing images, with PIL."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ktg_jax.data.cache import in_chunks
from ktg_jax.errors import InputError

_GREYSCALE_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL would clip them to 8 bits


@dataclass(frozen=True)
class ImageForm:
    """What every image of a data set is brought to.

    Attributes:
        height: in pixels.
        width: in pixels.
        greyscale: one channel; otherwise RGB.
        resize: images of another size are resized; otherwise they are an error.
    """

    height: int
    width: int
    greyscale: bool
    resize: bool = False


def form_of(paths: Sequence[Path], image_size: int | None = None) -> ImageForm:
    """The form for some image files: their own size, and greyscale if all of them are.

    Args:
        paths: of which the headers are read; at least one.
        image_size: resize to a square of this size, in pixels; None: the size of the first file.

    Raises:
        InputError: a file is not a PNG or JPEG image.
    """
    greyscale = all(_header(path)[0] in _GREYSCALE_MODES for path in paths)
    _, (width, height) = _header(paths[0])
    if image_size is not None:
        return ImageForm(image_size, image_size, greyscale, resize=True)
    return ImageForm(height, width, greyscale)


def read_images(paths: Sequence[Path], form: ImageForm, description: str) -> np.ndarray:
    """Decodes image files, in threads.

    Args:
        paths: PNG or JPEG files of 8 bits a channel. Transparency is dropped.
        form: see `ImageForm`.
        description: for the progress bar.

    Returns:
        uint8 `[n, form.height, form.width, 1 or 3]`.

    Raises:
        InputError: names the first file that cannot be decoded or has another size.
    """
    channels = 1 if form.greyscale else 3
    images = np.empty((len(paths), form.height, form.width, channels), np.uint8)

    def read(i: int) -> None:
        images[i] = _decode(paths[i], form).reshape(images.shape[1:])

    def read_all(chunk: range) -> None:
        for _ in threads.map(read, chunk):
            pass  # asking for each result raises the error of its thread

    with ThreadPoolExecutor() as threads:
        in_chunks(read_all, len(paths), description)
    return images


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes to squares, bilinear with antialiasing.

    Args:
        images: uint8 `[n, h, w, c]`.
        size: height and width of the result, in pixels.

    Returns:
        uint8 `[n, size, size, c]`; `images` itself if it has that size already.
    """
    count, height, width, channels = images.shape
    if (height, width) == (size, size):
        return images
    resized = np.empty((count, size, size, channels), np.uint8)
    for i, c in np.ndindex(count, channels):  # by channel: PIL has no modes for other than 1 and 3
        resized[i, :, :, c] = np.asarray(_resize(Image.fromarray(images[i, :, :, c]), size, size))
    return resized


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode, width and height of a file, without decoding it."""
    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except Exception as error:  # PIL has no common type for its decoding errors
        raise _unreadable(path) from error


def _decode(path: Path, form: ImageForm) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            # PIL warns of a palette with transparency unless it goes through RGBA
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            pixels = opaque.convert("L" if form.greyscale else "RGB")
    except Exception as error:  # PIL has no common type for its decoding errors
        raise _unreadable(path) from error
    if mode in _DEEP_MODES:
        raise InputError("data", str(path), f"images of 8 bits a channel, not PIL mode {mode}")
    if (height, width) == (form.height, form.width):
        return np.asarray(pixels)
    if not form.resize:
        raise InputError(
            "data",
            f"{path}: {width}x{height}",
            f"{form.width}x{form.height}, the size of the first image; "
            "--image-size resizes the images of a folder to one size",
        )
    return np.asarray(_resize(pixels, form.height, form.width))


def _resize(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _unreadable(path: Path) -> InputError:
    return InputError("data", str(path), "a complete, undamaged image file")
