"""Decoding image files and resizing images, with PIL."""

import logging
import math
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ktg_jax.data.cache import OnProgress, in_chunks
from ktg_jax.data.memory import empty
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_GREYSCALE_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL would clip them to 8 bits
_DEEP_CHANNELS = re.compile(r";16[BLN]")  # of these PIL would keep the high byte
_OF_LAYERS = ("MPO", "PSD")  # whose first frame is the picture, the others being its parts
_LARGE = 2**24  # pixels, of images that are decoded one at a time
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # or made by other programs


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


def image_suffixes() -> set[str]:
    """Suffixes of the files that can be read, as `.png`: what PIL and its plugins decode."""
    formats = {*_formats(), "MPO"}  # which is opened as a JPEG
    suffixes = Image.registered_extensions()
    return {suffix for suffix, name in suffixes.items() if name in formats}


def form_of(paths: Sequence[Path], image_size: int | None = None) -> ImageForm:
    """The form for some image files: their own size, and greyscale if all of them are.

    Args:
        paths: the paths of which the headers are read; at least one.
        image_size: resize to a square of this size, in pixels; None: the size of the first file.

    Raises:
        InputError: a file is not an image.
    """
    greyscale = all(_mode(path) in _GREYSCALE_MODES for path in paths)
    if image_size is not None:
        return ImageForm(image_size, image_size, greyscale, resize=True)
    with _opened(paths[0]) as image:
        width, height = _upright(image).size
    return ImageForm(height, width, greyscale)


def read_images(
    paths: Sequence[Path], form: ImageForm, what: str, on_progress: OnProgress | None = None
) -> np.ndarray:
    """Decodes image files, in threads; as a viewer shows them, whatever way the camera was held.

    Args:
        paths: image files of 8 bits a channel. Transparency is dropped; of several frames the
            first is taken, which is said in a warning.
        form: see `ImageForm`.
        what: is read, and
        on_progress: is told that: see `OnProgress`.

    Returns:
        uint8 `[n, form.height, form.width, 1 or 3]`.

    Raises:
        InputError: names the first file that cannot be decoded or has another size; or the images
            do not fit in memory.
    """
    channels = 1 if form.greyscale else 3
    shape = (len(paths), form.height, form.width, channels)
    images = _empty(shape, form)
    moving, turn = [], threading.Lock()

    def read(i: int) -> None:
        pixels, has_frames = _decode(paths[i], form, turn)
        images[i] = pixels.reshape(images.shape[1:])
        if has_frames:
            moving.append(paths[i])

    def read_all(chunk: range) -> None:
        for _ in threads.map(read, chunk):
            pass  # asking for each result raises the error of its thread

    with ThreadPoolExecutor() as threads:
        in_chunks(read_all, len(paths), what, on_progress)
    if moving:
        text = "%d images have several frames, of which the first is used: %s%s"
        more = ", ..." if len(moving) > 1 else ""
        _logger.warning(text, len(moving), min(moving), more)
    return images


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes to squares, bilinear with antialiasing.

    Args:
        images: uint8 `[n, h, w, c]`.
        size: height and width of the result, in pixels.

    Returns:
        uint8 `[n, size, size, c]`; `images` itself if it has that size already.

    Raises:
        InputError: the result does not fit in memory.
    """
    count, height, width, channels = images.shape
    if (height, width) == (size, size):
        return images
    form = ImageForm(size, size, greyscale=channels == 1, resize=True)
    resized = _empty((count, size, size, channels), form)
    for i, c in np.ndindex(count, channels):  # by channel: PIL has no modes for other than 1 and 3
        resized[i, :, :, c] = np.asarray(_resize(Image.fromarray(images[i, :, :, c]), size, size))
    return resized


def _empty(shape: tuple[int, int, int, int], form: ImageForm) -> np.ndarray:
    """An array for images of this form, if it fits in memory."""
    count, height, width, _ = shape
    if form.resize:
        return empty("image_size", height, shape)
    return empty("data", f"{count} images of {width}x{height} pixels", shape)


def _formats() -> list[str]:
    """PIL's names of the formats that are read."""
    Image.init()
    return [name for name in Image.OPEN if name not in _NO_PICTURES]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet; what goes wrong within is an InputError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise InputError("data", str(path), "a regular file")
        with Image.open(path, formats=_formats()) as image:
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        allowed = f"an image of at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise InputError("data", str(path), allowed) from error
    except Exception as error:  # PIL has no common type for its decoding errors
        raise InputError("data", str(path), "a complete, undamaged image file") from error


def _mode(path: Path) -> str:
    """The mode of a file, without decoding it."""
    with _opened(path) as image:
        return image.mode


def _decode(path: Path, form: ImageForm, turn: threading.Lock) -> tuple[np.ndarray, bool]:
    """The pixels of a file, and whether it has further frames; a large one waits for its turn."""
    with _opened(path) as image, turn if math.prod(image.size) > _LARGE else nullcontext():
        _check_depth(image, path)
        pixels = _in_form(_upright(image), form, path)
        return pixels, image.format not in _OF_LAYERS and getattr(image, "is_animated", False)


def _in_form(image: Image.Image, form: ImageForm, path: Path) -> np.ndarray:
    # PIL warns of a palette with transparency unless it goes through RGBA
    opaque = image.convert("RGBA") if "transparency" in image.info else image
    pixels = opaque.convert("L" if form.greyscale else "RGB")
    if pixels.size == (form.width, form.height):
        return np.asarray(pixels)
    if not form.resize:
        width, height = pixels.size
        raise InputError(
            "data",
            f"{path}: {width}x{height}",
            f"{form.width}x{form.height}, the size of the first image; "
            "image_size resizes the images of a folder to one size",
        )
    return np.asarray(_resize(pixels, form.height, form.width))


def _check_depth(image: Image.Image, path: Path) -> None:
    """Raises InputError where PIL would make 8 bits of more, by clipping or by cutting off."""
    if image.mode in _DEEP_MODES:
        allowed = f"images of 8 bits a channel, not PIL mode {image.mode}"
        raise InputError("data", str(path), allowed)
    for decoder, _, _, arguments in getattr(image, "tile", ()):
        is_deep = _DEEP_CHANNELS.search(str(arguments)) is not None
        if decoder in ("ppm", "ppm_plain"):
            is_deep = arguments[1] > 255  # the largest value
        if is_deep:
            raise InputError("data", str(path), "images of 8 bits a channel, not of 16")


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded, and turned as its EXIF orientation says."""
    image.load()
    with suppress(Exception):  # of many types: an EXIF block that cannot be read says nothing
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _resize(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)
