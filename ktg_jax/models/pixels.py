"""What networks see: floats. Stored images are uint8, and what they are divided by is said here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.models.network import NodeFns, with_images

DIVISOR = 255.0
"""The value of uint8 images that every network sees as 1."""


def check_floats(images: Any) -> None:
    """Refuses arrays, traced ones too, that are neither floats nor tokens.

    A network takes uint8 images 0 to 255 without a word, and is wrong about them if it was trained
    on them divided by 255, as ours are.

    Raises:
        InputError: integers that are no tokens, or anything else that is not a float.

    >>> check_floats(jnp.zeros((1, 8, 8, 1), jnp.uint8))
    Traceback (most recent call last):
    ktg_jax.errors.InputError: images: got 'uint8[1, 8, 8, 1]'; allowed: floats, as the network is \
to see them (uint8 divided by 255)
    """
    if not has_floats(images) and not has_tokens(images):
        found = f"{images.dtype}{list(images.shape)}"
        allowed = "floats, as the network is to see them (uint8 divided by 255)"
        raise InputError("images", found, allowed)


def has_floats(images: Any) -> bool:
    """Whether an array is of floats. What is no array is the network's own affair."""
    return not hasattr(images, "dtype") or jnp.issubdtype(images.dtype, jnp.floating)


def has_tokens(images: Any) -> bool:
    """Whether an array is of tokens in place of images: signed integers `[B, T]`.

    >>> has_tokens(jnp.zeros((4, 7), jnp.int32)), has_tokens(jnp.zeros((4, 8, 8, 1), jnp.int32))
    (True, False)
    """
    dtype = getattr(images, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.signedinteger) and images.ndim == 2


def to_float(images: jax.Array, divisor: float = DIVISOR) -> jax.Array:
    """Maps uint8 0..255 to float32 0..1; no normalisation beyond that, as in the papers.

    >>> to_float(jnp.array([0, 255], jnp.uint8)).tolist()
    [0.0, 1.0]
    """
    return jnp.asarray(images, jnp.float32) / divisor


@functools.lru_cache(maxsize=256)  # the same functions for the same network, as build_model's
def taking_pixels(fns: NodeFns, divisor: float = DIVISOR) -> NodeFns:
    """The same network, which divides uint8 images itself and takes floats as they are.

    Args:
        fns: a network of floats.
        divisor: what uint8 images are divided by.

    Returns:
        Functions that raise InputError for images of any other dtype.
    """

    def scaled(images: Any) -> Any:
        if getattr(images, "dtype", None) == jnp.uint8:
            images = to_float(images, divisor)
        check_floats(images)
        return images

    return with_images(fns, scaled)
