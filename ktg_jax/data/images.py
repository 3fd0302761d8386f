"""Decoding image files and resizing images, with PIL: all of a data set in one form."""

import logging
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from ktg_jax.data.cache import OnProgress, in_chunks
from ktg_jax.data.form import ImageForm
from ktg_jax.data.memory import empty
from ktg_jax.data.pictures import decoded, has_frames, is_greyscale, opened, upright
from ktg_jax.data.views import centre_part, resized
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_LARGE = 2**24  # pixels, of images that are decoded one at a time


def form_of(paths: Sequence[Path], image_size: int | None = None) -> ImageForm:
    """The form for some image files: their own size, and greyscale if all of them are.

    Args:
        paths: the paths of which the headers are read; at least one.
        image_size: resize to a square of this size, in pixels; None: the size of the first file.

    Raises:
        InputError: a file is not an image.
    """
    greyscale = True
    for path in paths:
        if greyscale:
            with opened(path, str(path)) as image:
                greyscale = is_greyscale(image)
    if image_size is not None:
        return ImageForm(image_size, image_size, greyscale, resize=True)
    with opened(paths[0], str(paths[0])) as image:
        width, height = upright(image).size
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
    images = _empty((len(paths), *form.shape), form)
    moving, turn = [], threading.Lock()

    def read(i: int) -> None:
        path = paths[i]
        with opened(path, str(path)) as image:
            with turn if math.prod(image.size) > _LARGE else nullcontext():
                images[i] = in_form(decoded(image, form.greyscale, str(path)), form, str(path))
            if has_frames(image):
                moving.append(path)

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
    made = _empty((count, size, size, channels), form)
    for i, c in np.ndindex(count, channels):  # by channel: PIL has no modes for other than 1 and 3
        made[i, ..., c : c + 1] = resized(Image.fromarray(images[i, :, :, c]), size, size)
    return made


def in_form(picture: Image.Image, form: ImageForm, name: str) -> np.ndarray:
    """A decoded picture in the form of its data set.

    Args:
        picture: of as many channels as the form has.
        form: to bring it to.
        name: what it is called in errors.

    Returns:
        uint8 `form.shape`.

    Raises:
        InputError: it has another size, where images are not resized.
    """
    width, height = picture.size
    if form.centre:
        box = centre_part(width, height, (form.height, form.width))
        return resized(picture, form.height, form.width, box)
    if (width, height) == (form.width, form.height):
        return np.asarray(picture).reshape(form.shape)
    if not form.resize:
        raise InputError(
            "data",
            f"{name}: {width}x{height}",
            f"{form.width}x{form.height}, the size of the first image; "
            "image_size resizes the images of a folder to one size",
        )
    return resized(picture, form.height, form.width)


def _empty(shape: tuple[int, int, int, int], form: ImageForm) -> np.ndarray:
    """An array for images of this form, if it fits in memory."""
    count, height, width, _ = shape
    if form.resize:
        return empty("image_size", height, shape)
    return empty("data", f"{count} images of {width}x{height} pixels", shape)
