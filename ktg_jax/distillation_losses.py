"""Losses between two nodes' logits beside the divergence, each one number a sample.

Logits float `[..., C]`; senders are detached unless it is said otherwise; all is computed in
float32. A logit of -inf excludes its class, as in `ktg_jax.losses`.
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.losses import checked_labels, cross_entropy, kl_divergence

_NO_CHANCE = -1e30
"""A logarithm of a probability of 0 that is finite: 0 times it is 0."""


def jensen_shannon_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    beta: float = 0.5,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """The generalised Jensen-Shannon divergence, per sample (GKD; Agarwal et al., ICLR 2024).

    T^2 (beta KL(p_s || m) + (1 - beta) KL(p_t || m)), m = beta p_s + (1 - beta) p_t, p = softmax(z
    / T). Bounded, symmetric for beta = 0.5; divided by beta it tends to KL(p_s || p_t) as beta
    tends to 0, and divided by 1 - beta to KL(p_t || p_s) as beta tends to 1.

    Args:
        receiver_logits: float `[..., C]`, z_t.
        sender_logits: float `[..., C]`, z_s.
        temperature: scalar T > 0.
        beta: above 0 and below 1.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 `[...]`, finite where classes are excluded, too.

    Raises:
        AssertionError: two shapes.

    >>> z = jnp.array([[0.0, 0.0], [0.0, -jnp.inf]])
    >>> [round(float(x), 4) for x in jensen_shannon_divergence(z, z[::-1])]
    [0.2158, 0.2158]
    """
    receiver, sender = _ends(receiver_logits, sender_logits, stop_sender_gradient)
    scale = jnp.asarray(temperature, jnp.float32)
    log_s, log_t = (
        jnp.maximum(jax.nn.log_softmax(z / scale), _NO_CHANCE) for z in (sender, receiver)
    )
    log_m = jnp.logaddexp(jnp.log(beta) + log_s, jnp.log1p(-beta) + log_t)
    to_sender = jnp.sum(jnp.exp(log_s) * (log_s - log_m), axis=-1)
    to_receiver = jnp.sum(jnp.exp(log_t) * (log_t - log_m), axis=-1)
    return scale**2 * (beta * to_sender + (1 - beta) * to_receiver)


def decoupled_kl_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """Decoupled knowledge distillation, per sample (DKD; Zhao et al., CVPR 2022, equation 7).

    T^2 (alpha KL(b_s || b_t) + beta KL(q_s || q_t)), where b has the probabilities of the label's
    class and of all others together, and q those of the others among themselves. The divergence
    itself has 1 - p_s(label) in place of beta, and alpha = 1.

    Args:
        receiver_logits: float `[..., C]`, z_t, of at least two classes.
        sender_logits: float `[..., C]`, z_s.
        labels: int `[...]`.
        temperature: scalar T > 0.
        alpha: weight of the label's class.
        beta: weight of the others.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 `[...]`; NaN, as its gradient then is, where the label is no class.

    Raises:
        AssertionError: two shapes, or not one label a sample.

    >>> receiver, sender = jnp.zeros((1, 3)), jnp.array([[0.0, 1.0, 1.0]])
    >>> decoupled_kl_divergence(receiver, sender, jnp.array([0]), alpha=0.0).tolist()
    [0.0]
    """
    receiver, sender = _ends(receiver_logits, sender_logits, stop_sender_gradient)
    labels = checked_labels(receiver, labels)
    chex.assert_rank(labels, receiver.ndim - 1)
    scale = jnp.asarray(temperature, jnp.float32)
    is_label = jnp.arange(receiver.shape[-1]) == labels[..., None]

    def parts(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = z / scale
        others = jnp.where(is_label, -jnp.inf, z)
        of_label = jnp.sum(jnp.where(is_label, z, 0.0), axis=-1)
        return jnp.stack([of_label, jax.nn.logsumexp(others, axis=-1)], axis=-1), others

    (both_t, others_t), (both_s, others_s) = parts(receiver), parts(sender)
    how = {"stop_sender_gradient": False}
    found = alpha * kl_divergence(both_t, both_s, **how)
    found += beta * kl_divergence(others_t, others_s, **how)
    return scale**2 * found * jnp.where(jnp.any(is_label, axis=-1), 1.0, jnp.nan)


def standardised_kl_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """The divergence of standardised logits, per sample (Sun et al., CVPR 2024).

    T^2 KL(p_s || p_t) with p = softmax(Z / T), Z each sample's logits minus their mean, divided by
    their standard deviation: the receiver need not match the size of the sender's logits. Equal
    logits become 0, without a gradient. The authors weigh it by 9 (CIFAR-100), at T = 2.

    Args:
        receiver_logits: float `[..., C]`, z_t.
        sender_logits: float `[..., C]`, z_s.
        temperature: scalar T > 0.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 `[...]`; excluded classes are left out of mean and deviation.

    Raises:
        AssertionError: two shapes.

    >>> z = jnp.array([[1.0, 2.0, 4.0]])
    >>> float(standardised_kl_divergence(z, 10 * z + 3).round(5)[0])
    0.0
    """
    receiver, sender = _ends(receiver_logits, sender_logits, stop_sender_gradient)
    standard = _standardised(receiver), _standardised(sender)
    return kl_divergence(*standard, temperature, stop_sender_gradient=False)


def logit_distance(
    receiver_logits: ArrayLike, sender_logits: ArrayLike, *, stop_sender_gradient: bool = True
) -> jax.Array:
    """The mean squared difference of logits, per sample (Ba & Caruana, 2014; Kim et al., 2021).

    Args:
        receiver_logits: float `[..., C]`.
        sender_logits: float `[..., C]`.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 `[...]`; a class that both exclude adds 0.

    Raises:
        AssertionError: two shapes.

    >>> logit_distance(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 0.0]])).tolist()
    [5.0]
    """
    receiver, sender = _ends(receiver_logits, sender_logits, stop_sender_gradient)
    same = receiver == sender  # -inf minus -inf is NaN
    difference = jnp.where(same, 0.0, receiver) - jnp.where(same, 0.0, sender)
    return jnp.mean(jnp.square(difference), axis=-1)


def probability_cosine(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """The cosine of two nodes' probabilities, per sample (Okamoto et al., 2021: Prob-).

    Minimised it pushes nodes apart, for the sake of their ensemble.

    Args:
        receiver_logits: float `[..., C]`.
        sender_logits: float `[..., C]`.
        temperature: scalar T > 0.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 `[...]`, in 0..1.

    Raises:
        AssertionError: two shapes.

    >>> z = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    >>> probability_cosine(z, z).tolist(), probability_cosine(z, z[::-1]).tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    receiver, sender = _ends(receiver_logits, sender_logits, stop_sender_gradient)
    scale = jnp.asarray(temperature, jnp.float32)
    p, q = (jax.nn.softmax(z / scale) for z in (receiver, sender))
    norms = jnp.sqrt(jnp.sum(p * p, axis=-1) * jnp.sum(q * q, axis=-1))  # at least 1 / C
    return jnp.sum(p * q, axis=-1) / norms


def smoothed_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, smoothing: float = 0.1
) -> jax.Array:
    """The cross-entropy with smoothed labels, per sample (Szegedy et al., CVPR 2016, section 7).

    A share of the label's weight is spread evenly over all classes.

    Args:
        logits: float `[..., C]`.
        labels: int `[...]`.
        smoothing: the share, at least 0 and below 1.

    Returns:
        float32 `[...]`; NaN where the label is no class, +inf where a class is excluded.

    Raises:
        AssertionError: another rank or dtype, or not one label a sample.

    >>> float(smoothed_cross_entropy(jnp.zeros((1, 2)), jnp.array([0])).round(4)[0])
    0.6930999755859375
    """
    logits = jnp.asarray(logits, jnp.float32)
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    spread = smoothing * uniform if smoothing else jnp.zeros_like(uniform)
    return (1 - smoothing) * cross_entropy(logits, labels) + spread


def _ends(receiver: ArrayLike, sender: ArrayLike, detach: bool) -> tuple[jax.Array, jax.Array]:
    receiver, sender = jnp.asarray(receiver, jnp.float32), jnp.asarray(sender, jnp.float32)
    chex.assert_equal_shape([receiver, sender])
    return receiver, jax.lax.stop_gradient(sender) if detach else sender


def _standardised(logits: jax.Array) -> jax.Array:
    """Mean 0 and deviation 1 over the classes that are not excluded."""
    is_there = logits != -jnp.inf
    known = jnp.where(is_there, logits, 0.0)
    # Whatever logits are divided by makes no difference; their squares must not overflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(known), axis=-1, keepdims=True))
    known = known / jnp.where(largest == 0, 1.0, largest)
    count = jnp.sum(is_there, axis=-1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(known, axis=-1, keepdims=True) / count
    centred = jnp.where(is_there, known - mean, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
    is_flat = variance <= 1e-14  # of logits up to 1: differences that float32 does not have
    deviation = jnp.sqrt(jnp.where(is_flat, 1.0, variance))
    return jnp.where(is_there, jnp.where(is_flat, 0.0, centred / deviation), -jnp.inf)
