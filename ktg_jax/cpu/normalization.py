"""Batch normalisation, the shortcut's addition and relu in one: natively on CPUs, else in JAX."""

import functools

import jax
import jax.numpy as jnp

from ktg_jax.cpu import operations
from ktg_jax.cpu.convolution import uses_native_operations

Moments = tuple[jax.Array, jax.Array]


def normalize_relu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    moments: Moments,
    shortcut: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """`relu((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)` with given moments.

    Args:
        x: float `[..., C]`.
        scale: float32 `[C]`.
        bias: float32 `[C]`.
        moments: mean and variance, float32 `[C]`.
        shortcut: float, as x; None: nothing is added.
        epsilon: added to the variance.
        dtype: the dtype of the result; the normalisation itself is computed in float32, or in
            float64 where x is.

    >>> x = jnp.array([[1.0], [3.0]])
    >>> normalize_relu(x, jnp.ones(1), jnp.zeros(1), (jnp.ones(1), jnp.ones(1)), epsilon=0).tolist()
    [[0.0], [2.0]]
    """
    x = _wide(x)
    mean, variance, scale, bias = (_along(x, vector) for vector in (*moments, scale, bias))
    y = (x - mean) * (scale * jax.lax.rsqrt(variance + epsilon)) + bias
    y = y.astype(dtype)
    return jax.nn.relu(y if shortcut is None else shortcut.astype(dtype) + y)


def batch_norm_relu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None = None,
    *,
    shift: jax.Array | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, Moments]:
    """`normalize_relu` with the moments of the batch itself, through which gradients flow.

    Args:
        x: float `[..., C]`.
        scale: float32 `[C]`.
        bias: float32 `[C]`.
        shortcut: float, as x, or None.
        shift: float32 `[C]`, a guess at the mean (the running mean, say), which makes the variance
            exact that is computed in one pass over x.
        epsilon: added to the variance.
        axis_name: a mapped axis over which the batch is spread, or None.
        dtype: the dtype of the result.

    Returns:
        The result, and the mean and biased variance of the batch, float32 `[C]` (float64 where x
        is), which carry no gradient.

    >>> y, (mean, variance) = batch_norm_relu(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1))
    >>> y.round(3).tolist(), mean.tolist(), variance.tolist()
    ([[0.0], [1.0]], [2.0], [1.0])
    """
    arrays = (x,) if shortcut is None else (x, shortcut)
    if dtype == jnp.float32 and uses_native_operations(*arrays):
        scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
        y, moments = _native(x, scale, bias, shortcut, epsilon, axis_name)
    else:
        moments = _one_pass_moments(_wide(x), shift, axis_name)
        y = normalize_relu(x, scale, bias, moments, shortcut, epsilon=epsilon, dtype=dtype)
    return y, jax.lax.stop_gradient(moments)


def _one_pass_moments(x: jax.Array, shift: jax.Array | None, axis_name: str | None) -> Moments:
    axes = tuple(range(x.ndim - 1))
    if shift is None:
        shift = jnp.zeros(x.shape[-1], x.dtype)
    shift = jax.lax.stop_gradient(shift.astype(x.dtype))
    shifted = x - _along(x, shift)
    mean, square = jnp.mean(shifted, axes), jnp.mean(jnp.square(shifted), axes)
    if axis_name is not None:
        mean, square = jax.lax.pmean((mean, square), axis_name)
    return mean + shift, jnp.maximum(square - jnp.square(mean), 0.0)


def _wide(x: jax.Array) -> jax.Array:
    """In float32, or in float64 as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _along(x: jax.Array, vector: jax.Array) -> jax.Array:
    """A value for each of x's channels `[C]`, in x's rank and dtype."""
    return jnp.expand_dims(vector.astype(x.dtype), range(x.ndim - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _native(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    epsilon: float,
    axis_name: str | None,
) -> tuple[jax.Array, Moments]:
    return _native_forward(x, scale, bias, shortcut, epsilon, axis_name)[0]


def _native_forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    epsilon: float,
    axis_name: str | None,
) -> tuple[tuple[jax.Array, Moments], tuple[jax.Array | None, ...]]:
    moments = operations.moments(x)
    if axis_name is not None:
        moments = operations.combine_moments(moments, axis_name)
    mean, variance = moments
    inverse = jax.lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    y = operations.normalize(x, slope, bias - mean * slope, shortcut)
    # What the relu lets through is seen in y: the shortcut itself is not needed again.
    with_shortcut = None if shortcut is None else jnp.zeros((), jnp.float32)
    return (y, moments), (x, y, mean, inverse, scale, with_shortcut)


def _native_backward(
    epsilon: float,
    axis_name: str | None,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, Moments],
) -> tuple[jax.Array | None, ...]:
    """The gradients, with g the gradient before the relu and n the number of values a channel.

    dx = scale / std * (g - sum(g) / n - (x - mean) / var * sum(g (x - mean)) / n).
    """
    del epsilon
    x, y, mean, inverse, scale, with_shortcut = saved
    dy, _ = cotangents  # the moments carry no gradient
    total, product = operations.normalize_gradient_sums(dy, y, x, mean)
    count = x.size // x.shape[-1]
    mean_total, mean_product = total / count, product / count
    if axis_name is not None:
        mean_total, mean_product = jax.lax.pmean((mean_total, mean_product), axis_name)
    slope = scale * inverse
    by_x = -slope * jnp.square(inverse) * mean_product
    to_x, *to_shortcut = operations.normalize_input_gradient(
        dy, y, x, slope, by_x, -slope * mean_total - by_x * mean, with_shortcut is not None
    )
    return to_x, product * inverse, total, to_shortcut[0] if to_shortcut else None


_native.defvjp(_native_forward, _native_backward)
