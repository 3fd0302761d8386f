"""A batch in equal parts, one after another: less memory, and the gradients of the whole."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.errors import InputError


def check_parts(batch_size: int, parts: int) -> None:
    """Raises InputError unless a batch, or a device's share of it, can be cut into equal parts.

    >>> check_parts(64, 4)
    """
    if parts < 1 or batch_size % parts:
        raise InputError("accumulate", parts, f"a divisor of {batch_size}, the images of a device")


def part_of_batch(batch: Any, parts: int, index: ArrayLike) -> Any:
    """One of several equal parts of a batch: every `parts`-th sample, from the index-th on.

    Taken so, a part of the whole batch is the same parts of all devices' shares.

    Args:
        batch: a tree of arrays with a leading axis B.
        parts: a divisor of B.
        index: 0 to parts - 1; may be traced.

    >>> part_of_batch(jnp.arange(6), 2, 1).tolist()
    [1, 3, 5]
    """

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x.reshape(len(x) // parts, parts, *x.shape[1:])[:, index]

    return jax.tree.map(cut, batch)


def weights_of_parts(where: ArrayLike | None, parts: int, axis_name: str | None) -> jax.Array:
    """What each part's means weigh in those of the batch: float32 `[parts]`, of sum 1.

    Args:
        where: bool `[B, ...]`, which samples count; None: all.
        parts: a divisor of B.
        axis_name: the mapped axis over which the batch is spread, or None.

    >>> weights_of_parts(jnp.array([True, False, True, True]), 2, None).tolist()
    [0.6666666865348816, 0.3333333432674408]
    """
    if where is None:
        return jnp.full(parts, 1 / parts, jnp.float32)
    each = [part_of_batch(jnp.asarray(where, bool), parts, i) for i in range(parts)]
    counts = jnp.stack([jnp.sum(part, dtype=jnp.float32) for part in each])
    if axis_name is not None:
        counts = jax.lax.pmean(counts, axis_name)
    return counts / jnp.maximum(jnp.sum(counts), 1.0)


def added(total: Any, new: Any, weight: ArrayLike) -> Any:
    """The sum of a tree of floats and weight times another one.

    >>> added(jnp.ones(()), jnp.ones(()), 0.5).tolist()
    1.5
    """
    return jax.tree.map(lambda a, b: (a + weight * b).astype(a.dtype), total, new)


def zeros_of(shapes: Any) -> Any:
    """A tree of zeros, of the shapes and dtypes of another one."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
