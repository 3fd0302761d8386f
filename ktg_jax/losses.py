"""Losses on logits: label edges, transfer edges, and a whole graph of them (KTG, section 3).

Node t learns from L_t = sum over s of L[t, s]: the cross-entropy with the label on the diagonal,
the divergence from node s elsewhere, each through its gate. Senders are detached, so one backward
pass of sum_t L_t gives every node exactly the gradient of its own loss.

A logit of -inf excludes its class: probability 0. Labels that are no class are never taken for one:
their loss and its gradient are NaN, under `jax.jit` too. Shapes and dtypes that do not fit raise
chex's AssertionError.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The label edge's per-sample loss: CE(softmax(z), y).

    Args:
        logits: float `[B, C]`.
        labels: int `[B]`, classes in 0..C-1.

    Returns:
        float32 `[B]`; +inf where the logits exclude the label, and NaN, as the gradient then is,
        where the label is no class.

    Raises:
        AssertionError: another rank or dtype, or not one label a sample.

    >>> cross_entropy(jnp.zeros((2, 2)), jnp.array([1, 2])).round(3).tolist()
    [0.6930000185966492, nan]
    """
    logits = jnp.asarray(logits, jnp.float32)
    labels = checked_labels(logits, labels)
    chex.assert_rank(labels, logits.ndim - 1)
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(is_class, labels, 0)
    )
    return losses * jnp.where(is_class, 1.0, jnp.nan)


def kl_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """A transfer edge's per-sample loss: T^2 KL(p_s || p_t), p = softmax(z / T).

    The factor T^2 keeps the gradient's size independent of the temperature. Exact: unlike the
    authors' code there is no constant inside the logarithm, and values and gradients stay finite
    for logits far beyond any network's (1e30). A term with p_s = 0 is 0, also where p_t = 0.

    Args:
        receiver_logits: float `[B, C]`, z_t, the node that learns.
        sender_logits: float `[B, C]`, z_s, the node that teaches.
        temperature: scalar T > 0.
        stop_sender_gradient: whether the sender is detached, as it is in a graph.

    Returns:
        float32 `[B]`; +inf where the sender gives weight to a class that the receiver excludes.

    Raises:
        AssertionError: shapes other than `[B, C]`, or two of them.

    >>> masked = jnp.array([[0.0, 0.0, -jnp.inf]])
    >>> all_classes = jnp.zeros((1, 3))
    >>> [float(kl_divergence(masked, sender, 4.0)[0]) for sender in (masked, all_classes)]
    [0.0, inf]
    """
    receiver_logits = jnp.asarray(receiver_logits, jnp.float32)
    sender_logits = jnp.asarray(sender_logits, jnp.float32)
    chex.assert_equal_shape([receiver_logits, sender_logits])
    if stop_sender_gradient:
        sender_logits = jax.lax.stop_gradient(sender_logits)
    scale = jnp.asarray(temperature, jnp.float32)
    log_sender = jax.nn.log_softmax(sender_logits / scale)
    # Elsewhere both are taken as 0 before they meet: -inf minus -inf is NaN, in gradients too.
    has_weight = jnp.exp(log_sender) != 0  # true for NaN, which is to be seen
    divergence = optax.losses.kl_divergence_with_log_targets(
        jnp.where(has_weight, jax.nn.log_softmax(receiver_logits / scale), 0.0),
        jnp.where(has_weight, log_sender, 0.0),
    )
    return divergence * jnp.asarray(temperature**2, jnp.float32)


def reverse_kl_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """The divergence the other way round, per sample: T^2 KL(p_t || p_s), p = softmax(z / T).

    It asks the receiver to be where the sender is, not to be wherever the sender is (MiniLLM, Gu
    et al., ICLR 2024). Arguments and result as of `kl_divergence`.

    >>> z = jnp.array([[0.0, 0.0]])
    >>> reverse_kl_divergence(z, z).tolist()
    [0.0]
    """
    receiver_logits = jnp.asarray(receiver_logits, jnp.float32)
    sender_logits = jnp.asarray(sender_logits, jnp.float32)
    if stop_sender_gradient:
        sender_logits = jax.lax.stop_gradient(sender_logits)
    return kl_divergence(sender_logits, receiver_logits, temperature, stop_sender_gradient=False)


def is_correct(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Whether the largest logit is the label's: never where the label is no class.

    Args:
        logits: float `[..., C]`.
        labels: int `[...]`, one a sample; leading axes may be left out.

    Returns:
        bool `[...]`, of the logits.

    Raises:
        AssertionError: another dtype, or not one label a sample.

    >>> is_correct(jnp.array([[0.0, 2.0], [0.0, 2.0]]), jnp.array([1, -1])).tolist()
    [True, False]
    """
    logits = jnp.asarray(logits)
    labels = checked_labels(logits, labels)
    return jnp.argmax(logits, axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])


def checked_labels(logits: jax.Array, labels: ArrayLike) -> jax.Array:
    """Labels as JAX's own integers, in which no class number wraps around, one a sample.

    Args:
        logits: float `[..., C]`.
        labels: int `[...]`; leading axes may be left out.

    Raises:
        AssertionError: another dtype, or not one label a sample.
    """
    if isinstance(labels, np.ndarray) and labels.dtype == np.int64:
        # JAX may keep the lower half alone, in which the least int64 is class 0.
        labels = np.clip(labels, -1, np.iinfo(np.int32).max)
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int)
    chex.assert_rank(labels, set(range(1, logits.ndim)))
    chex.assert_shape(labels, logits.shape[logits.ndim - 1 - labels.ndim : -1])
    return labels.astype(int)
