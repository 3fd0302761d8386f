"""Random numbers of a node in training, such as dropout's: a stream in its model state.

A stream is a key, which the seed and the node's name determine, and the number of training passes
so far. Each pass folds that number into the key: a run that resumes draws what it would have drawn,
and both engines draw the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

STREAM = "random_stream"
"""The part of a linen module's model state that is no collection of the module's own."""

_NEITHER_PARAMS_NOR_DATA = 0x5EED

_axis: ContextVar[str | None] = ContextVar("axis", default=None)


@contextmanager
def batch_spread_over(axis_name: str | None) -> Iterator[None]:
    """Within it, nodes draw other numbers on each device of that mapped axis; None: one device."""
    token = _axis.set(axis_name)
    try:
        yield
    finally:
        _axis.reset(token)


def batch_is_spread() -> bool:
    """Whether it is within `batch_spread_over` an axis."""
    return _axis.get() is not None


def of_this_device(key: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The key for this device's share of the batch.

    Args:
        key: the key of the whole batch, or several.
        axis_name: the mapped axis that the batch is spread over, where `batch_spread_over` does
            not say it.
    """
    axis = _axis.get() or axis_name
    if axis is None:
        return key
    index = jax.lax.axis_index(axis)
    if not is_key(key):  # of the old kind, plain integers
        return jax.random.fold_in(key, index)
    return jnp.vectorize(lambda key: jax.random.fold_in(key, index))(key)


def new_stream(rng: jax.Array) -> dict[str, jax.Array]:
    """The stream of a node whose weights are drawn from that key."""
    key = jax.random.fold_in(rng, _NEITHER_PARAMS_NOR_DATA)
    return {"key": key, "count": jnp.zeros((), jnp.int32)}


def advanced(stream: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The stream after a training pass."""
    return {**stream, "count": stream["count"] + 1}


def keys_of(
    stream: Mapping[str, jax.Array], names: Sequence[str], axis_name: str | None = None
) -> dict[str, jax.Array]:
    """A key for each name, for the next training pass on this device.

    >>> stream = new_stream(jax.random.key(0))
    >>> keys = keys_of(stream, ["dropout", "noise"])
    >>> bool(keys["dropout"] == keys["noise"])
    False
    >>> bool(keys_of(advanced(stream), ["dropout"])["dropout"] == keys["dropout"])
    False
    """
    key = of_this_device(jax.random.fold_in(stream["key"], stream["count"]), axis_name)
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}


def without_stream(model_state: Any) -> Any:
    """A model state, or a flat one (`ktg_jax.io.trees`), without its stream."""
    if not isinstance(model_state, dict):
        return model_state
    return {k: v for k, v in model_state.items() if k.partition(".")[0] != STREAM}


def with_new_stream(model_state: Any, template: Any, rng: jax.Array) -> Any:
    """A model state with a stream from that key, where a template (of shapes) has one."""
    has_stream = isinstance(template, dict) and STREAM in template
    return {**model_state, STREAM: new_stream(rng)} if has_stream else model_state


def with_own_keys(model_state: Any, own: Any) -> Any:
    """A model state from elsewhere, without a stream, that draws a node's own random numbers.

    Args:
        model_state: to replace the node's.
        own: the node's, of which all random keys, and the stream, are kept.
    """
    taken = jax.tree.map(
        lambda new, old: old if is_key(old) else new,
        model_state,
        without_stream(own),
    )
    has_stream = isinstance(own, dict) and STREAM in own
    return {**taken, STREAM: own[STREAM]} if has_stream else taken


def is_key(leaf: Any) -> bool:
    """Whether an array is one of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
