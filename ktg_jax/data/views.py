"""Views of one image, as a training or an evaluation sees it. Host only, no JAX.

`shifted` is the papers' augmentation, an image padded by reflection and cropped to its own size;
`random_part` and `centre_part` are ImageNet's: a random part of an image, and its middle.
"""

import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ATTEMPTS = 10
"""How many random parts are tried until one is inside the image."""

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_CENTRE = 7 / 8

Box: TypeAlias = tuple[float, float, float, float]
"""Left, upper, right and lower border, in pixels."""


def shifted(image: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """An image shifted, then mirrored left to right; what moves in is reflected at the border.

    Args:
        image: `[H, W, C]`.
        down: in pixels, fewer than H.
        right: likewise, fewer than W.
        mirrored: whether it is mirrored.

    >>> shifted(np.arange(3).reshape(1, 3, 1), 0, 1, False).ravel().tolist()
    [1, 2, 1]
    """
    height, width = image.shape[:2]
    rows, columns = np.arange(height), np.arange(width)
    if mirrored:
        columns = columns[::-1]
    return image[np.ix_(reflected(rows + down, height), reflected(columns + right, width))]


def random_part(width: int, height: int, numbers: np.ndarray) -> Box:
    """A random part of an image: 8 to 100 per cent of its area, of a ratio of 3:4 to 4:3.

    As in Inception's training (Szegedy et al., 2015), and in torchvision's RandomResizedCrop: of
    some attempts the first that fits into the image; if none does, its middle, as much of it as the
    ratios allow.

    Args:
        width: of the image, in pixels.
        height: likewise.
        numbers: float `[attempts, 4]` in [0, 1): they choose area, ratio, left and upper border.

    >>> random_part(8, 8, np.full((1, 4), 0.0))
    (0.0, 0.0, 2.0, 3.0)
    """
    for area, ratio, left, upper in np.asarray(numbers, np.float64):
        pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        low, high = map(math.log, _RATIO)
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = math.floor(left * (width - w + 1)), math.floor(upper * (height - h + 1))
            return float(x), float(y), float(x + w), float(y + h)
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    return _middle(width, height, min(width, round(height * ratio)), min(height, width / ratio))


def centre_part(width: int, height: int, wanted: tuple[int, int]) -> Box:
    """The middle of an image, 7/8 of what has the wanted ratio: 224 of 256 pixels.

    Args:
        width: of the image, in pixels.
        height: likewise.
        wanted: height and width of what is made of the part.

    >>> centre_part(64, 32, (8, 8))
    (18.0, 2.0, 46.0, 30.0)
    """
    scale = _CENTRE * min(width / wanted[1], height / wanted[0])
    return _middle(width, height, wanted[1] * scale, wanted[0] * scale)


def resized(picture: "Image", height: int, width: int, box: Box | None = None) -> np.ndarray:
    """A picture, or a part of it, in another size: bilinear with antialiasing.

    Returns:
        uint8 `[height, width, channels]`.
    """
    from PIL.Image import Resampling  # only where there are pictures

    made = picture.resize((width, height), Resampling.BILINEAR, box=box)
    return np.asarray(made).reshape(height, width, -1)


def _middle(width: int, height: int, w: float, h: float) -> Box:
    x, y = (width - w) / 2, (height - h) / 2
    return x, y, x + w, y + h


def reflected(position: np.ndarray, size: int) -> np.ndarray:
    """Positions in -size+1 .. 2 size-2 reflected into 0 .. size-1, the border not doubled."""
    position = np.abs(position)
    return np.minimum(position, 2 * (size - 1) - position)
