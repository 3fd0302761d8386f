"""The sparse recoding penalty: what of a prior matters is decided by size (KR, abstract).

The abstract says that the student learns "with the penalized gradients". That the penalty is a soft
threshold, at a quantile of the gradient's magnitudes in each layer, is our reading; so are its
loss form, a dead-zone quadratic, and the alternative, an L1 penalty on coefficients of filters.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.checks import check_share


def sparse_recoding(quantile: float) -> optax.GradientTransformation:
    """Soft-thresholds every leaf of a gradient at that quantile of its own magnitudes.

    sign(g) max(|g| - tau, 0), with tau the quantile of |g| within the leaf (`recoding_threshold`).
    Meant for the prior's gradient alone, before it is added to the task's.

    Args:
        quantile: in [0, 1]. 0 is the identity, 1 gives zeros; in between a share 1 - quantile of
            the entries is kept, smaller by tau, in their order and with their signs.

    Raises:
        InputError: a quantile that is not a number in [0, 1].

    >>> penalty = sparse_recoding(0.5)
    >>> gradient = {"kernel": jnp.array([1.0, -4.0, 3.0, -2.0])}
    >>> penalty.update(gradient, penalty.init(gradient))[0]["kernel"].tolist()
    [0.0, -2.0, 1.0, -0.0]
    """
    check_share("quantile", quantile)

    def recode(leaf: ArrayLike) -> jax.Array:
        return soft_threshold(leaf, recoding_threshold(leaf, quantile))

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(recode, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def recoding_threshold(array: ArrayLike, quantile: float) -> jax.Array:
    """The magnitude at which a share `quantile` of an array's entries is cut off.

    The k-th smallest magnitude with k = quantile x number of entries, rounded; 0 if k = 0. No
    interpolation: soft-thresholding there leaves n - k entries, fewer where magnitudes tie with it.

    Args:
        array: float `[...]`; may have no entries.
        quantile: in [0, 1]; a Python number, since it chooses an entry when the step is compiled.

    Returns:
        Scalar `[]` of the array's dtype, not negative and without a gradient.

    >>> [float(recoding_threshold(jnp.array([-3.0, 1.0]), q)) for q in (0.0, 0.5, 1.0)]
    [0.0, 1.0, 3.0]
    """
    array = jax.lax.stop_gradient(jnp.asarray(array))
    cut_off = round(quantile * array.size)
    if cut_off == 0:
        return jnp.zeros((), array.dtype)
    return _kth_smallest(jnp.abs(array), cut_off)


def _kth_smallest(magnitudes: jax.Array, k: int) -> jax.Array:
    """The k-th smallest of floats that are not negative, bit by bit; NaN is larger than all.

    Such floats are in the order of their bits read as integers. Each bit takes a pass over the
    array, which for large kernels is several times as fast as to sort them.
    """
    width = 8 * magnitudes.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.dtype(f"uint{width}"))

    def with_bit(i: jax.Array, known: jax.Array) -> jax.Array:
        larger = known + (jnp.ones((), bits.dtype) << (width - 2 - i).astype(bits.dtype))
        return jnp.where(jnp.sum(bits < larger) < k, larger, known)

    # The sign is none; from the highest bit on.
    found = jax.lax.fori_loop(0, width - 1, with_bit, jnp.zeros((), bits.dtype))
    return jax.lax.bitcast_convert_type(found, magnitudes.dtype)


def soft_threshold(array: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """Brings every entry closer to 0 by the threshold, or to 0: sign(x) max(|x| - tau, 0).

    Args:
        array: float `[...]`.
        threshold: float, tau >= 0, of a shape that broadcasts.

    Returns:
        In the shape and dtype of the array.

    >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    array = jnp.asarray(array)
    return jnp.sign(array) * jnp.maximum(jnp.abs(array) - threshold, 0)


def dead_zone_loss(residual: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """The loss form of soft-thresholding: 1/2 max(|r| - tau, 0)^2, entry by entry.

    Its gradient is soft_threshold(r, tau): exactly what is left of the gradient r of 1/2 r^2. For
    a residual that is itself a function of parameters both forms differ, since here the threshold
    acts before that function's derivative and in `sparse_recoding` after it.

    Args:
        residual: float `[...]`.
        threshold: float, tau >= 0, of a shape that broadcasts; receives no gradient.

    Returns:
        In the shape and dtype of the residual.

    >>> dead_zone_loss(jnp.array([-3.0, 0.5]), 1.0).tolist()
    [2.0, 0.0]
    """
    beyond = jnp.maximum(jnp.abs(jnp.asarray(residual)) - jax.lax.stop_gradient(threshold), 0)
    return 0.5 * jnp.square(beyond)


def l1_recoding(kernel: ArrayLike, prior_kernel: ArrayLike, penalty: ArrayLike) -> jax.Array:
    """How much of each prior filter a student's filter holds, most of it none.

    The alpha that minimises 1/2 ||w_i - alpha_i a_i||^2 + penalty |alpha_i| for each filter i.
    Filters do not share coefficients, so the problem is one of scalars: a single proximal step of
    size 1 / ||a_i||^2 solves it from any start, alpha_i = S(<w_i, a_i>, penalty) / ||a_i||^2 with
    the soft threshold S.

    Args:
        kernel: float `[..., out]`, the student's filters w.
        prior_kernel: float, of the same shape, the prior's filters a.
        penalty: scalar, not negative.

    Returns:
        float32 `[out]`; 0 for a prior filter of zeros.

    >>> filters = jnp.eye(2)
    >>> l1_recoding(filters, filters * jnp.array([1.0, -2.0]), 0.5).tolist()
    [0.5, -0.375]
    """
    kernel, prior_kernel = jnp.asarray(kernel, jnp.float32), jnp.asarray(prior_kernel, jnp.float32)
    chex.assert_equal_shape([kernel, prior_kernel])
    axes = tuple(range(kernel.ndim - 1))
    inner = jnp.sum(kernel * prior_kernel, axes)
    square = jnp.sum(jnp.square(prior_kernel), axes)
    return soft_threshold(inner, penalty) / jnp.where(square > 0, square, 1.0)
