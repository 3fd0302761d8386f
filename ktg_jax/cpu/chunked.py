"""The gradient of a convolution's kernel on CPUs, in plain JAX."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_CHUNK_VALUES = 2**19
"""Values of the images at a time: what is computed on stays near; more chunks compile longer."""


def weight_gradient(
    images: jax.Array, gradient: jax.Array, shape: Sequence[int], stride: int, padding: int
) -> jax.Array:
    """The gradient to the kernel of a convolution, as a few large matrix products.

    XLA's own kernel gradient on CPUs is up to four times slower than its forward pass. The usual
    remedy, a matrix of all patches, copies the images once for each position in the kernel. Here
    only the kernel's columns are laid side by side, and on the output's side; a row is a slice.

    Args:
        images: float `[B, H, W, in]`.
        gradient: the gradient of the outputs, float `[B, H', W', out]`.
        shape: the shape of the kernel, `[h, w, in, out]`.
        stride: along both axes.
        padding: on all four sides.

    Returns:
        float `[h, w, in, out]`.
    """
    rows, columns, channels, features = shape
    width = images.shape[2]
    extent = stride * (gradient.shape[1] - 1) + 1
    total = jnp.zeros((rows, channels, columns * features), images.dtype)
    chunk = max(_CHUNK_VALUES // math.prod(images.shape[1:]), 16)
    for start in range(0, images.shape[0], chunk):
        part = images[start : start + chunk]
        part = jnp.pad(part, ((0, 0), (padding, padding), (0, 0), (0, 0)))
        shifted = jnp.concatenate(
            [
                _place(gradient[start : start + chunk], column - padding, stride, width)
                for column in range(columns)
            ],
            axis=-1,
        )
        total += jnp.stack(
            [_product(part[:, row : row + extent : stride], shifted) for row in range(rows)]
        )
    by_row = total.reshape(rows, channels, columns, features)
    return by_row.transpose(0, 2, 1, 3)


def _place(x: jax.Array, first: int, stride: int, width: int) -> jax.Array:
    """Puts columns of x at first, first + stride, ... of `width` columns, zeros between."""
    last = first + stride * (x.shape[2] - 1)
    none = (0, 0, 0)
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x, zero, (none, none, (first, width - 1 - last, stride - 1), none))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum over all axes but the last of x's entries times y's: `[C_x, C_y]`."""
    contracted = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((contracted, contracted), ((), ())))
