"""Samples that are mixed with others: what label edges know of them."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ktg_jax.losses import checked_labels


class Mixed(NamedTuple):
    """What is mixed into each sample, as mixup does. A pytree.

    Attributes:
        labels: int `[...]`, the labels of what is mixed in.
        share: float32 `[...]` in [0, 1], the share of the sample's own label; the label edge's loss
            is the mean of its losses for both labels, weighed by their shares.

    >>> from ktg_jax import edge_losses
    >>> own, other, through = jnp.array([0]), jnp.array([1]), jnp.array([[0]])
    >>> logits, mixed = jnp.array([[[0.0, 2.0]]]), Mixed(other, jnp.array([0.75]))
    >>> losses = [edge_losses(logits, y, through, 1.0).item() for y in (own, other)]
    >>> found = edge_losses(logits, own, through, 1.0, mixed=mixed).item()
    >>> abs(found - (0.75 * losses[0] + 0.25 * losses[1])) < 1e-6
    True
    """

    labels: Any
    share: Any


def checked_mixed(
    mixed: Mixed, logits: jax.Array, labels: jax.Array, where: jax.Array | None
) -> Mixed:
    """As `edge_losses` uses it: any label that is no class gives NaN, as it does among others."""
    others, share = checked_labels(logits, mixed.labels), jnp.asarray(mixed.share, jnp.float32)
    chex.assert_equal_shape([others, share, labels])
    if where is not None:
        others, share = jnp.where(where, others, 0), jnp.where(where, share, 1.0)
    return Mixed(others, share)
