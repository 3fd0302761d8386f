"""What arrays of images and labels must be, and how one that is not is most likely mended."""

import logging
import math

import numpy as np

from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_IMAGES = "uint8[n, h, w, c], none of them 0"
_CHANNELS = (1, 3, 4)
_SMALLEST_SIDE = 8  # of what is certainly a picture
_NEARLY_BLACK = 32


def describe(array: np.ndarray) -> str:
    """Dtype and shape, for messages: `float32[3, 4]`."""
    return f"{array.dtype}{list(array.shape)}"


def check_images(images: np.ndarray, field: str, name: str = "images") -> None:
    """Checks the dtype and the shape of images.

    Args:
        images: any array.
        field: for the error.
        name: the name of the array, for the expression that the error proposes.

    Raises:
        InputError: they are not uint8 `[n, h, w, c]`, or the channels certainly come first.
    """
    is_uint8 = images.dtype == np.uint8
    if is_uint8 and images.ndim == 4 and 0 not in images.shape:
        if channels_first(images.shape) == "certain":
            allowed = f"channels last: {name}.transpose(0, 2, 3, 1)"
            raise InputError(field, describe(images), allowed)
        return
    has_range = not is_uint8 and images.dtype.kind in "uif" and 0 not in images.shape
    found = describe(images) + (f", values {_range(images)}" if has_range else "")
    mended, allowed = mended_images(images, name), _IMAGES
    if mended is not None:
        allowed += f"; here {'times 255: ' if ' * 255' in mended else ''}{mended}"
    elif has_range:
        allowed += ", values of 0 to 255"
    raise InputError(field, found, allowed)


def channels_first(shape: tuple[int, ...]) -> str | None:
    """Whether the channels of `[n, h, w, c]` seem to come before height and width.

    Returns:
        `certain`: as pictures are, and other data is not; `likely`; None: no sign of it.

    >>> [channels_first((9, *s)) for s in ((3, 32, 32), (1, 50, 9), (3, 32, 3), (4, 4, 16))]
    ['certain', 'likely', None, None]
    """
    _, height, width, channels = shape
    if channels in _CHANNELS or height >= min(width, channels):
        return None
    is_square = width == channels
    is_picture = is_square or (height > 1 and min(width, channels) >= _SMALLEST_SIDE)
    if height in _CHANNELS and is_picture:
        return "certain"
    return "likely" if height in _CHANNELS or is_square else None


def mended_images(images: np.ndarray, name: str) -> str | None:
    """The expression that makes of an array what images must be; None: it cannot be told.

    >>> mended_images(np.zeros((2, 28, 28)), "images")
    "(images[..., None] * 255).round().astype('uint8')"
    """
    if images.dtype.kind not in "buif" or 0 in images.shape:
        return None
    layout, scale = _layout(images.shape), _scale(images)
    return None if layout is None or scale is None else scale.format(name + layout)


def _layout(shape: tuple[int, ...]) -> str | None:
    """What is to be appended to an array to make `[n, h, w, c]` of it."""
    if len(shape) == 4:
        return ".transpose(0, 2, 3, 1)" if channels_first(shape) == "certain" else ""
    if len(shape) == 3:
        return "[..., None]"
    if len(shape) != 2:
        return None
    for channels in (1, 3):
        side = math.isqrt(shape[1] // channels)
        if side > 1 and channels * side * side == shape[1]:
            first = f".reshape(-1, {channels}, {side}, {side}).transpose(0, 2, 3, 1)"
            return f".reshape(-1, {side}, {side}, 1)" if channels == 1 else first
    return None


def _scale(images: np.ndarray) -> str | None:
    """How values become uint8 of 0 to 255, `{}` being the array."""
    kind = images.dtype.kind
    if images.dtype == np.uint8:
        return "{}"
    if kind == "b":
        return "({} * 255).astype('uint8')"
    whole = "" if kind in "ui" else ".round()"
    low, high = images.min(), images.max()  # of not-a-numbers every comparison is false
    if low >= 0 and high <= 1:
        return f"({{}} * 255){whole}.astype('uint8')"
    if low >= 0 and high <= 255:
        return f"{{}}{whole}.astype('uint8')"
    if kind == "f" and low >= -1 and high <= 1:
        return "(({} + 1) * 127.5).round().astype('uint8')"
    return None


def check_labels(labels: np.ndarray, field: str, name: str, num_classes: int) -> None:
    """Checks the dtype, the shape and the range of labels.

    Args:
        labels: any array.
        field: for the error.
        name: the name of the array, for the expression that the error proposes.
        num_classes: at most.

    Raises:
        InputError: they are not integers `[n]` from 0 to `num_classes - 1`.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        mended = mended_labels(labels, name)
        how = ", one class per image" if mended is None else f"; here {mended}"
        raise InputError(field, describe(labels), "integers [n]" + how)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        label, allowed = int(labels[wrong][0]), f"0 to {num_classes - 1}"
        if {*np.unique(labels)} == {-1, 1}:
            allowed += f"; here ({name} + 1) // 2"
        elif label == -1:
            allowed += "; images of no class are to be left out"
        raise InputError(field, label, allowed)


def mended_labels(labels: np.ndarray, name: str) -> str | None:
    """The expression that makes of an array what labels must be; None: it cannot be told.

    >>> mended_labels(np.eye(3), "labels"), mended_labels(np.array([[0.0], [2.0]]), "labels")
    ('labels.argmax(axis=1)', 'labels[:, 0].astype(int)')
    """
    if labels.ndim == 2 and 1 in labels.shape:
        column = f"{name}[:, 0]" if labels.shape[1] == 1 else f"{name}[0]"
        return mended_labels(labels.reshape(-1), column)
    kind = labels.dtype.kind
    if labels.ndim == 2 and kind in "buif" and labels.size:
        is_share = (labels >= 0).all() and np.allclose(labels.sum(axis=1), 1, atol=1e-3)
        return f"{name}.argmax(axis=1)" if is_share else None
    if labels.ndim != 1:
        return None
    if kind in "US":
        return f"np.unique({name}, return_inverse=True)[1], with class_names=np.unique({name})"
    if kind == "b" or (kind == "f" and (labels == np.round(labels)).all()):
        return f"{name}.astype(int)"
    return name if kind in "iu" else None


def check_values(images: np.ndarray, field: str) -> None:
    """Looks at the values of images: warns of what can hardly be meant.

    Args:
        images: uint8 `[n, h, w, c]`.
        field: for the error and the warnings.

    Raises:
        InputError: 0 and 1 are the only values, which both are black.
    """
    low, high = int(images.min()), int(images.max())
    if (low, high) == (0, 1):
        raise InputError(field, "the values 0 and 1 alone", "0 to 255, white being 255: times 255")
    if low == high:
        _logger.warning("%s: all pixels of all images are %d", field, low)
    elif high < _NEARLY_BLACK:
        text = "%s: no value is above %d, which is nearly black; white is 255"
        _logger.warning(text, field, high)


def _range(array: np.ndarray) -> str:
    digits = "d" if array.dtype.kind in "ui" else ".4g"
    return f"{array.min():{digits}} to {array.max():{digits}}"
