"""Decoding a picture, with PIL: as a viewer shows it, in 8 bits a channel."""

import io
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps

from ktg_jax.errors import InputError

_GREYSCALE_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL would clip them to 8 bits
_DEEP_CHANNELS = re.compile(r";16[BLN]")  # of these PIL would keep the high byte
_OF_LAYERS = ("MPO", "PSD")  # whose first frame is the picture, the others being its parts
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # or made by other programs


def image_suffixes() -> set[str]:
    """Suffixes of the files that can be read, as `.png`: what PIL and its plugins decode."""
    formats = {*_formats(), "MPO"}  # which is opened as a JPEG
    suffixes = Image.registered_extensions()
    return {suffix for suffix, name in suffixes.items() if name in formats}


@contextmanager
def opened(file: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet; what goes wrong within is an InputError.

    Args:
        file: its path, or what it holds.
        name: what it is called in errors.
    """
    try:
        # a pipe would be waited for
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise InputError("data", name, "a regular file")
        given = file if isinstance(file, Path) else io.BytesIO(file)
        with Image.open(given, formats=_formats()) as image:
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        allowed = f"an image of at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise InputError("data", name, allowed) from error
    except Exception as error:  # PIL has no common type for its decoding errors
        raise InputError("data", name, "a complete, undamaged image file") from error


def is_greyscale(image: Image.Image) -> bool:
    """Whether an image that is opened has no colours, by its header."""
    return image.mode in _GREYSCALE_MODES


def has_frames(image: Image.Image) -> bool:
    """Whether an opened image has frames beside the first, as an animation has."""
    return image.format not in _OF_LAYERS and getattr(image, "is_animated", False)


def decoded(image: Image.Image, greyscale: bool, name: str) -> Image.Image:
    """An opened image decoded: upright, opaque, and of one channel or of three.

    Raises:
        InputError: it has more than 8 bits a channel.
    """
    _check_depth(image, name)
    image = upright(image)
    # PIL warns of a palette with transparency unless it goes through RGBA
    opaque = image.convert("RGBA") if "transparency" in image.info else image
    return opaque.convert("L" if greyscale else "RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded, and turned as its EXIF orientation says."""
    image.load()
    with suppress(Exception):  # of many types: an EXIF block that cannot be read says nothing
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _check_depth(image: Image.Image, name: str) -> None:
    """Raises InputError where PIL would make 8 bits of more, by clipping or by cutting off."""
    if image.mode in _DEEP_MODES:
        allowed = f"images of 8 bits a channel, not PIL mode {image.mode}"
        raise InputError("data", name, allowed)
    for decoder, _, _, arguments in getattr(image, "tile", ()):
        is_deep = _DEEP_CHANNELS.search(str(arguments)) is not None
        if decoder in ("ppm", "ppm_plain"):
            is_deep = arguments[1] > 255  # the largest value
        if is_deep:
            raise InputError("data", name, "images of 8 bits a channel, not of 16")


def _formats() -> list[str]:
    """PIL's names of the formats that are read."""
    Image.init()
    return [name for name in Image.OPEN if name not in _NO_PICTURES]
