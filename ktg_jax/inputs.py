"""What images a node wants: normalised by a mean and a deviation, and of a size.

Networks from elsewhere want the images that they were trained with; the description is here, and
`ktg_jax.models.input` makes the network's functions follow it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ktg_jax.checks import is_number, is_whole
from ktg_jax.errors import InputError, did_you_mean
from ktg_jax.io.json_input import check_fields, decoded

OF_DATA = "data"
"""As a node's input: the statistics of the training images themselves."""

MOST_SIZE = 4096
_MOST_CHANNELS = 1024


@dataclass(frozen=True)
class Input:
    """What a network does to images before it sees them: resized first, then normalised.

    Attributes:
        mean: subtracted from each channel of images in 0..1; one number for all channels, or one a
            channel.
        std: what each channel is divided by then, likewise; above 0.
        size: height and width that images are resized to on the device, in pixels; None: as they
            are.

    >>> NAMED["imagenet"].mean
    (0.485, 0.456, 0.406)
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; the size only where there is one."""
        size = {} if self.size is None else {"size": self.size}
        return {"mean": list(self.mean), "std": list(self.std), **size}


NAMED = {
    "imagenet": Input((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Input((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Input((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "half": Input((0.5,), (0.5,)),
}
"""Inputs by name: the statistics of training images, and images from -1 to 1."""


def checked_input(field: str, given: Any) -> str | Input:
    """An input as it is given: a name as it is, an object of its fields as an `Input`.

    Args:
        field: that an error is of.
        given: a name of `NAMED`, `data`, an `Input`, or a mapping of its fields.

    Raises:
        InputError: no such name, an unknown field, numbers that are not finite, a deviation that is
            not above 0, another number of deviations than of means, or a size out of range.

    >>> checked_input("input", {"size": 32})
    Input(mean=(0.0,), std=(1.0,), size=32)
    >>> checked_input("input", "imagenet")
    'imagenet'
    """
    if isinstance(given, str):
        names = (*NAMED, OF_DATA)
        if given not in names:
            allowed = f"{', '.join(names)}, or an object with mean, std and size"
            raise InputError(field, given, allowed + did_you_mean(given, names))
        return given
    if isinstance(given, Input):
        given = {"mean": given.mean, "std": given.std, "size": given.size}
    check_fields(field, given, required=(), optional=("mean", "std", "size"))
    mean = _numbers(f"{field}.mean", given.get("mean", (0.0,)))
    std = _numbers(f"{field}.std", given.get("std", (1.0,)))
    if not all(number > 0 for number in std):
        raise InputError(f"{field}.std", list(std), "numbers above 0")
    if 1 not in (len(mean), len(std)) and len(mean) != len(std):
        raise InputError(f"{field}.std", list(std), f"{len(mean)} numbers, as many as means, or 1")
    size = given.get("size")
    if size is not None and not (is_whole(size, 1) and size <= MOST_SIZE):
        raise InputError(f"{field}.size", size, f"a whole number of pixels from 1 to {MOST_SIZE:,}")
    return Input(mean, std, size)


def parsed_input(field: str, text: str) -> str | Input:
    """An input as a command line has it: a name, or an object as JSON.

    >>> parsed_input("input", '{"mean": [0.5], "std": [0.5]}') == NAMED["half"]
    True
    """
    return checked_input(field, decoded(field, text) if text.lstrip().startswith("{") else text)


def input_text(given: str | Input) -> str:
    """The text that `parsed_input` reads."""
    return given if isinstance(given, str) else json.dumps(given.to_json())


def resolved_input(given: str | Input, of_data: Input | None = None) -> Input:
    """The numbers of an input.

    Args:
        given: as `checked_input` returns it.
        of_data: the statistics of the training images, where they are known.

    Raises:
        InputError: it is the data's, which are not known.
    """
    if given == OF_DATA:
        if of_data is None:
            raise InputError("input", given, f"{', '.join(NAMED)}: there are no training images")
        return of_data
    return NAMED[given] if isinstance(given, str) else given


def _numbers(field: str, given: Any) -> tuple[float, ...]:
    """One number, or a list of some, as a tuple."""
    numbers = [given] if is_number(given) else given
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if not is_list or not 1 <= len(numbers) <= _MOST_CHANNELS or not all(map(_is_finite, numbers)):
        raise InputError(field, given, "a finite number, or a list with one a channel")
    return tuple(float(number) for number in numbers)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
