"""Means over what counts of a batch, of which each device may have a share."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def mean_of(
    values: jax.Array, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
    """The mean over what counts; arguments as of `edge_losses`, values float32 of that shape.

    >>> float(mean_of(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])))
    1.5
    """
    if where is not None:
        where = jnp.asarray(where, bool)
        values = jnp.where(where, values, 0.0) * shares_of(where, axis_name)
    return jnp.mean(values)


def shares_of(where: jax.Array, axis_name: str | None) -> jax.Array:
    """The weight of each sample in a plain mean: 0 for what does not count, else more than 1."""
    count = jnp.sum(where, dtype=jnp.float32)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return where.astype(jnp.float32) * (where.size / jnp.maximum(count, 1.0))
