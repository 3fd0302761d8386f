"""Losses that compare how the samples of a batch relate to each other; each a number a batch.

Each takes `sample_weights`, float32 of the batch's shape: samples of weight 0 neither count nor are
seen by the others. Where a batch is spread over a mapped axis, samples are compared within a
device's share.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.errors import InputError


def correlation_loss(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    sample_weights: ArrayLike | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """DIST (Huang et al., NeurIPS 2022, equations 8 to 10): correlations in place of equality.

    T^2 (beta mean_i (1 - r(p_t,i, p_s,i)) + gamma mean_c (1 - r(p_t,.c, p_s,.c))), p = softmax(z /
    T), r Pearson's correlation: of each sample's probabilities over classes, and of each class's
    over the samples. What does not vary correlates with nothing, and has no gradient.

    Args:
        receiver_logits: float `[..., C]`, z_t.
        sender_logits: float `[..., C]`, z_s.
        temperature: scalar T > 0.
        sample_weights: float `[...]`; None: 1 each. The second term has their mean.
        beta: weight of the correlations over classes.
        gamma: weight of the correlations over samples.
        stop_sender_gradient: whether the sender is detached.

    Returns:
        float32 scalar `[]`.

    Raises:
        AssertionError: two shapes.

    >>> z = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0]])
    >>> float(correlation_loss(z, z).round(5))
    0.0
    """
    receiver, sender = jnp.asarray(receiver_logits, jnp.float32), jnp.asarray(sender_logits)
    chex.assert_equal_shape([receiver, sender])
    sender = sender.astype(jnp.float32)
    sender = jax.lax.stop_gradient(sender) if stop_sender_gradient else sender
    scale, classes = jnp.asarray(temperature, jnp.float32), receiver.shape[-1]
    p, q = (jax.nn.softmax(z / scale).reshape(-1, classes) for z in (receiver, sender))
    weights = _weights(sample_weights, p)
    over_classes = _correlation(p, q, jnp.ones(classes), axis=1)
    over_samples = _correlation(p, q, weights[:, None], axis=0)
    inter = jnp.mean(weights * (1 - over_classes))
    intra = jnp.mean(weights) * jnp.mean(1 - over_samples)
    return scale**2 * (beta * inter + gamma * intra)


def similarity_loss(
    receiver_stages: Sequence[ArrayLike],
    sender_stages: Sequence[ArrayLike],
    sample_weights: ArrayLike | None = None,
) -> jax.Array:
    """Similarity-preserving distillation (Tung & Mori, ICCV 2019, equations 1 to 4).

    ||G_t - G_s||_F^2 / B^2, where G has the inner products of all pairs of samples, as the last
    stage shows them, each row divided by its norm. Of networks of any widths.

    Args:
        receiver_stages: float `[B, ...]` each, the last of which counts.
        sender_stages: likewise, of as many samples; detached.
        sample_weights: float `[B]`; None: 1 each.

    Returns:
        float32 scalar `[]`.

    Raises:
        InputError: a network without stages.

    >>> one, two = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> float(similarity_loss([one], [3 * one])), round(float(similarity_loss([one], [two])), 4)
    (0.0, 0.2929)
    """
    receiver, sender = (_last(stages) for stages in (receiver_stages, sender_stages))
    weights = _weights(sample_weights, receiver)
    counts = weights != 0

    def rows(features: jax.Array) -> jax.Array:
        features = jnp.where(counts[:, None], features, 0.0)
        # A row has the same direction whatever features are divided by; they must not overflow.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features)))
        features = features / jnp.where(largest == 0, 1.0, largest)
        return _unit(features @ features.T)

    distance = jnp.sum(jnp.square(rows(receiver) - rows(jax.lax.stop_gradient(sender))), axis=1)
    number = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1.0)
    return jnp.mean(weights * distance) / number


def contrastive_loss(
    receiver_stages: Sequence[ArrayLike],
    sender_stages: Sequence[ArrayLike],
    sample_weights: ArrayLike | None = None,
    *,
    tau: float = 0.1,
) -> jax.Array:
    """Contrastive representation distillation (CRD; Tian et al., ICLR 2020), in a batch.

    Mean over samples of -log softmax_j(f_t,i . f_s,j / tau)[i], f the last stage averaged over
    positions, divided by its norm: each sample's receiver must find its own sender among those of
    the batch. The authors draw negatives from a memory of all images and embed both ends; here they
    are the batch's other samples, and both ends have as many channels.

    Args:
        receiver_stages: float `[B, h, w, C]` each, the last of which counts.
        sender_stages: likewise, with as many channels in the last; detached.
        sample_weights: float `[B]`; None: 1 each.
        tau: temperature of the comparison, above 0.

    Returns:
        float32 scalar `[]`.

    Raises:
        InputError: a network without stages, or another number of channels.

    >>> stages = [jnp.eye(2).reshape(2, 1, 1, 2)]
    >>> round(float(contrastive_loss(stages, stages, tau=1.0)), 4)  # log(1 + exp(-1))
    0.3133
    """
    receiver, sender = (_pooled(stages) for stages in (receiver_stages, sender_stages))
    if receiver.shape != sender.shape:
        allowed = f"{receiver.shape[-1]}, as the receiver's"
        raise InputError("channels of a sender's last stage", sender.shape[-1], allowed)
    weights = _weights(sample_weights, receiver)
    counts = weights != 0
    ends = [jnp.where(counts[:, None], end, 0.0) for end in (receiver, sender)]
    first, second = _unit(ends[0]), _unit(jax.lax.stop_gradient(ends[1]))
    scores = first @ second.T / tau
    itself = jnp.eye(len(scores), dtype=bool)
    scores = jnp.where(counts[None] | itself, scores, -jnp.inf)
    own = jnp.sum(jnp.where(itself, scores, 0.0), axis=1)
    return jnp.mean(weights * (jax.nn.logsumexp(scores, axis=1) - own))


def _weights(sample_weights: ArrayLike | None, like: jax.Array) -> jax.Array:
    """Weights float32 `[B]`."""
    if sample_weights is None:
        return jnp.ones(len(like), jnp.float32)
    weights = jnp.asarray(sample_weights, jnp.float32).reshape(-1)
    chex.assert_shape(weights, (len(like),))
    return weights


def _correlation(p: jax.Array, q: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """Pearson's correlation along an axis, weighted; 0 where one of them does not vary."""
    total = jnp.sum(jnp.broadcast_to(weights, p.shape), axis=axis, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)

    def centred(values: jax.Array) -> jax.Array:
        return values - jnp.sum(weights * values, axis=axis, keepdims=True)

    p, q = centred(p), centred(q)
    squares = jnp.sum(weights * p * p, axis=axis) * jnp.sum(weights * q * q, axis=axis)
    is_flat = squares <= 1e-28
    norm = jnp.sqrt(jnp.where(is_flat, 1.0, squares))
    return jnp.where(is_flat, 0.0, jnp.sum(weights * p * q, axis=axis) / norm)


def _unit(rows: jax.Array) -> jax.Array:
    """Rows `[B, n]` divided by their norms; one of zeros stays so, without a gradient."""
    square = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
    is_nothing = square == 0
    return jnp.where(is_nothing, 0.0, rows * jax.lax.rsqrt(jnp.where(is_nothing, 1.0, square)))


def _last(stages: Sequence[ArrayLike]) -> jax.Array:
    """The last stage, flattened to float32 `[B, n]`."""
    if not stages:
        raise InputError("stages", 0, "at least one stage")
    last = jnp.asarray(stages[-1], jnp.float32)
    return last.reshape(len(last), -1)


def _pooled(stages: Sequence[ArrayLike]) -> jax.Array:
    """The last stage averaged over positions, float32 `[B, C]`."""
    if not stages:
        raise InputError("stages", 0, "at least one stage")
    if np.ndim(stages[-1]) != 4:
        raise InputError("a stage's output", np.shape(stages[-1]), "[B, h, w, C]")
    return jnp.mean(jnp.asarray(stages[-1], jnp.float32), axis=(1, 2))
