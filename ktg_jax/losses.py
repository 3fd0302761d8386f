"""Losses on logits: label edges, transfer edges, and a whole graph of them (KTG, section 3).

Node t learns from L_t = sum over s of L[t, s]: the cross-entropy with the label on the diagonal,
the divergence from node s elsewhere, each through its gate. Senders are detached, so one backward
pass of sum_t L_t gives every node exactly the gradient of its own loss.

A logit of -inf excludes its class: probability 0. Labels that are no class are never taken for one:
their loss and its gradient are NaN, under `jax.jit` too. Shapes and dtypes that do not fit raise
chex's AssertionError.
"""

from collections.abc import Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ktg_jax.gates import CUTOFF, gate_weights

Logits: TypeAlias = ArrayLike | Sequence[ArrayLike]


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
    chex.assert_rank(logits, 2)
    labels = _checked_labels(logits, labels)
    is_class = (labels >= 0) & (labels < logits.shape[1])
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
    chex.assert_rank([receiver_logits, sender_logits], 2)
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


def edge_losses(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The gated loss of every edge of a graph.

    Args:
        logits: float `[N, B, C]`, or a sequence of N arrays `[B, C]`; all nodes' outputs from one
            simultaneous forward pass.
        labels: int `[B]`, classes in 0..C-1.
        gates: int `[N, N]`, codes of `ktg_jax.GATES`; row = receiver, column = sender,
            diagonal = label edge. May be traced.
        progress: scalar in [0, 1], training progress k / k_end with the iteration k from 1.
        temperature: scalar T > 0 of the transfer edges; label edges have none.

    Returns:
        float32 `[N, N]`; entry `[t, s]` is the mean of the weighted losses over the *whole* batch
        (also for `correct`: divided by B, not by the number of samples kept). Only node t's
        logits receive a gradient from row t. Samples that a gate weighs 0 add 0 where their loss
        is infinite, and a cut edge sees neither its sender nor its label.

    Raises:
        AssertionError: other ranks, shapes or dtypes.

    >>> logits = jnp.zeros((2, 4, 10))  # two undecided nodes: they agree, and know nothing
    >>> gates = jnp.zeros((2, 2), int)  # all through
    >>> edge_losses(logits, jnp.arange(4), gates, progress=0.5).round(3).tolist() == [
    ...     [jnp.log(10.0).round(3), 0.0], [0.0, jnp.log(10.0).round(3)]]
    True
    """
    logits, gates = _stack(logits), jnp.asarray(gates)
    num_nodes = logits.shape[0]
    chex.assert_rank(logits, 3)
    chex.assert_shape(gates, (num_nodes, num_nodes))

    senders = jax.lax.stop_gradient(logits)
    weights = gate_weights(gates, progress, is_correct(logits, labels))
    is_cut = gates == CUTOFF

    # What a cut edge compares the receiver with is the receiver itself, not the sender or label: 0
    # times the loss from a sender that has diverged would be NaN, and cut must be as good as none.
    def row_losses(receiver: jax.Array, row_is_cut: jax.Array) -> jax.Array:
        itself = jax.lax.stop_gradient(receiver)[None]
        seen = jnp.where(row_is_cut[:, None, None], itself, senders)
        return jax.vmap(lambda sender: kl_divergence(receiver, sender, temperature))(seen)

    transfer = jax.vmap(row_losses)(logits, is_cut)
    labels = _checked_labels(logits[0], labels)[None]
    seen_labels = jnp.where(jnp.diagonal(is_cut)[:, None], jnp.argmax(senders, axis=-1), labels)
    label = jax.vmap(cross_entropy)(logits, seen_labels)
    on_diagonal = jnp.eye(num_nodes, dtype=bool)[:, :, None]
    losses = jnp.where(on_diagonal, label[:, None, :], transfer)
    losses = jnp.where((weights == 0) & (losses == jnp.inf), 0.0, losses)
    return jnp.mean(weights * losses, axis=-1)


def is_correct(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Whether the largest logit is the label's: never where the label is no class.

    Args:
        logits: float `[..., B, C]`.
        labels: int `[B]`.

    Returns:
        bool `[..., B]`.

    Raises:
        AssertionError: another dtype, or not one label a sample.

    >>> is_correct(jnp.array([[0.0, 2.0], [0.0, 2.0]]), jnp.array([1, -1])).tolist()
    [True, False]
    """
    logits = jnp.asarray(logits)
    labels = _checked_labels(logits, labels)
    return jnp.argmax(logits, axis=-1) == jnp.broadcast_to(labels, logits.shape[:-1])


def node_losses(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The loss of every node, L_t = sum over s of L[t, s]; arguments as for `edge_losses`.

    Returns:
        float32 `[N]`.

    >>> cut = jnp.ones((2, 2), int)
    >>> node_losses(jnp.zeros((2, 4, 10)), jnp.arange(4), cut, progress=0.5).tolist()
    [0.0, 0.0]
    """
    return jnp.sum(edge_losses(logits, labels, gates, progress, temperature), axis=1)


def graph_loss(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The sum of all nodes' losses; arguments as for `edge_losses`.

    Since senders are detached, its gradient with respect to node t's logits is exactly that of
    node t's own loss.

    Returns:
        float32 scalar `[]`.

    >>> logits, labels, through = jnp.zeros((1, 1, 2)), jnp.array([1]), jnp.array([[0]])
    >>> jax.grad(graph_loss)(logits, labels, through, 1.0).tolist()  # softmax minus one-hot
    [[[0.5, -0.5]]]
    """
    return jnp.sum(node_losses(logits, labels, gates, progress, temperature))


def _checked_labels(logits: jax.Array, labels: ArrayLike) -> jax.Array:
    """Labels as JAX's own integers, in which no class number wraps around, one a sample."""
    if isinstance(labels, np.ndarray) and labels.dtype == np.int64:
        # JAX may keep the lower half alone, in which the least int64 is class 0.
        labels = np.clip(labels, -1, np.iinfo(np.int32).max)
    labels = jnp.asarray(labels)
    chex.assert_type(labels, int)
    chex.assert_shape(labels, logits.shape[-2:-1])
    return labels.astype(int)


def _stack(logits: Logits) -> jax.Array:
    """Stacks N arrays `[B, C]` to float32 `[N, B, C]`: losses are computed in float32."""
    if isinstance(logits, list | tuple):
        return jnp.stack([jnp.asarray(z, jnp.float32) for z in logits])
    return jnp.asarray(logits, jnp.float32)
