"""Networks that normalise and resize their images themselves, as their `Input` says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.models.network import NodeFns, with_images
from ktg_jax.models.pixels import DIVISOR, check_floats

_AT_ONCE = 2**26
"""Pixels whose statistics are summed at once."""


@functools.lru_cache(maxsize=256)  # the same functions for the same network, as build_model's
def with_input(fns: NodeFns, wanted: Input) -> NodeFns:
    """The same network, which is given images in 0..1 and sees them as it wants them.

    Args:
        fns: a network of floats.
        wanted: its input.

    Returns:
        Functions of images float `[B, H, W, C]`, of any height and width where the input has a
        size. They raise InputError where the input has numbers for another number of channels.

    >>> import ktg_jax as ktg
    >>> fns = with_input(ktg.build_model("cnn", 10), Input((0.5,), (0.25,), size=16))
    >>> params, state = fns.init(jax.random.key(0), images := jnp.ones((2, 8, 8, 1)))
    >>> fns.apply(params, state, images, False)[0].shape
    (2, 10)
    """
    seen = with_images(fns, lambda images: as_wanted(images, wanted))
    return dataclasses.replace(
        seen, init=lambda rng, images: fns.init(rng, as_wanted(images, wanted))
    )


def as_wanted(images: jax.Array, wanted: Input) -> jax.Array:
    """Images float `[B, H, W, C]` in 0..1 as a network wants them: resized, then normalised.

    Resized by linear interpolation, with antialiasing where they become smaller.

    Raises:
        InputError: images that are no floats, or with another number of channels.

    >>> as_wanted(jnp.ones((1, 2, 2, 1)), Input((0.5,), (0.25,), size=3))[0, 0, :, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    check_floats(images)
    batch, height, width, channels = images.shape
    check_channels("input", wanted, channels)
    if wanted.size is not None and (height, width) != (wanted.size, wanted.size):
        images = jax.image.resize(images, (batch, wanted.size, wanted.size, channels), "linear")
    if wanted.mean == (0.0,) and wanted.std == (1.0,):
        return images
    mean, std = (jnp.asarray(numbers, images.dtype) for numbers in (wanted.mean, wanted.std))
    return (images - mean) / std


def check_channels(field: str, wanted: Input, channels: int) -> None:
    """Raises InputError, of this field, where an input is of images with other channels."""
    for part, numbers in (("mean", wanted.mean), ("std", wanted.std)):
        if len(numbers) not in (1, channels):
            allowed = f"1 number, or {channels}, one a channel of the images"
            raise InputError(f"{field}.{part}", list(numbers), allowed)


def statistics(images: np.ndarray) -> Input:
    """The mean and the deviation of each channel of images, uint8 `[n, H, W, C]`, in 0..1.

    Raises:
        InputError: a channel that is the same everywhere.

    >>> statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    Input(mean=(0.5,), std=(0.5,), size=None)
    """
    channels = images.shape[-1]
    flat = images.reshape(-1, channels)
    sums, squares = np.zeros(channels), np.zeros(channels)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE].astype(np.uint64)
        sums += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    mean = sums / len(flat)
    std = np.sqrt(np.maximum(squares / len(flat) - mean**2, 0))
    if not std.all():
        raise InputError("input", "data", "images none of whose channels is the same everywhere")
    return Input(tuple((mean / DIVISOR).tolist()), tuple((std / DIVISOR).tolist()))
