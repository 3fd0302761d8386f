"""Losses of tokens chunk by chunk: memory for all pairs of nodes, but only for some tokens at once.

All pairs of N nodes have `N x N x B x T x V` numbers between their logits and a loss, and as many
again for its gradient. Losses that are one number a token need not have them all at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ktg_jax.mixed import Mixed

MOST_NUMBERS = 2**24
"""Of all pairs of nodes, at once: 64 MiB."""


class TokenBatch(NamedTuple):
    """What losses see of a batch of tokens: all that has the axes `[B, T]`.

    Attributes:
        logits: N arrays, float32 `[B, T, V]`.
        labels: int `[B, T]`.
        sample_weights: float32 `[B, T, N, N]`, what gates give each token.
        mixed: what is mixed into each, or None.
    """

    logits: tuple[jax.Array, ...]
    labels: jax.Array
    sample_weights: jax.Array
    mixed: Mixed | None


def tokens_at_once(num_nodes: int, shape: tuple[int, ...]) -> int:
    """How many tokens of each sequence are in a chunk.

    Args:
        num_nodes: N.
        shape: `[B, T, ..., V]`, of the logits.

    >>> tokens_at_once(4, (8, 1024, 32768)), tokens_at_once(2, (8, 16, 100))
    (4, 16)
    """
    numbers = num_nodes**2 * shape[0]
    for size in shape[2:]:
        numbers *= size
    return min(shape[1], max(1, MOST_NUMBERS // numbers))


def mean_over_chunks(
    function: Callable[[TokenBatch], jax.Array], batch: TokenBatch, size: int
) -> jax.Array:
    """The function's mean over all tokens, from its means over so many tokens at a time.

    Each chunk is computed anew for the gradient, and what lies between is not kept.

    Args:
        function: a mean over the tokens of a batch.
        batch: of T tokens.
        size: tokens of a chunk; T is divided into as many as it takes.

    >>> batch = TokenBatch((), jnp.arange(10).reshape(2, 5), jnp.zeros((2, 5, 1, 1)), None)
    >>> float(mean_over_chunks(lambda part: jnp.mean(part.labels.astype(float)), batch, size=2))
    4.5
    """
    length = batch.labels.shape[1]
    if size >= length:
        return function(batch)
    count, rest = divmod(length, size)

    def cut(array: jax.Array) -> jax.Array:
        parts = array[:, : count * size].reshape(len(array), count, size, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    means = jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, batch))
    total = jnp.sum(means, axis=0) * (size / length)
    if rest:
        last: TokenBatch = jax.tree.map(lambda array: array[:, count * size :], batch)
        total += function(last) * (rest / length)
    return total
