"""Losses on logits: label edges, transfer edges, and a whole graph of them (KTG, section 3).

Node t learns from L_t = sum over s of L[t, s]: the cross-entropy with the label on the diagonal,
the divergence from node s elsewhere, each through its gate. Senders are detached, so one backward
pass of sum_t L_t gives every node exactly the gradient of its own loss.
"""

from collections.abc import Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
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
        float32 `[B]`.

    >>> bool(cross_entropy(jnp.zeros((1, 2)), jnp.array([1]))[0] == jnp.log(2.0))
    True
    """
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    chex.assert_rank([logits, labels], [2, 1])
    chex.assert_type(labels, int)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def kl_divergence(
    receiver_logits: ArrayLike,
    sender_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    stop_sender_gradient: bool = True,
) -> jax.Array:
    """A transfer edge's per-sample loss: T^2 KL(p_s || p_t), p = softmax(z / T).

    The factor T^2 keeps the gradient's size independent of the temperature. Exact: unlike the
    authors' code there is no constant inside the logarithm, and values and gradients stay finite
    for logits far beyond any network's (1e30).

    Args:
        receiver_logits: float `[B, C]`, z_t, the node that learns.
        sender_logits: float `[B, C]`, z_s, the node that teaches.
        temperature: scalar T > 0.
        stop_sender_gradient: whether the sender is detached, as it is in a graph.

    Returns:
        float32 `[B]`.

    >>> kl_divergence(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0]]), 4.0).tolist()
    [0.0]
    """
    receiver_logits = jnp.asarray(receiver_logits, jnp.float32)
    sender_logits = jnp.asarray(sender_logits, jnp.float32)
    chex.assert_rank([receiver_logits, sender_logits], 2)
    chex.assert_equal_shape([receiver_logits, sender_logits])
    if stop_sender_gradient:
        sender_logits = jax.lax.stop_gradient(sender_logits)
    divergence = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(receiver_logits / temperature),
        jax.nn.log_softmax(sender_logits / temperature),
    )
    return divergence * temperature**2


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
        logits receive a gradient from row t.

    >>> logits = jnp.zeros((2, 4, 10))  # two undecided nodes: they agree, and know nothing
    >>> gates = jnp.zeros((2, 2), int)  # all through
    >>> edge_losses(logits, jnp.arange(4), gates, progress=0.5).round(3).tolist() == [
    ...     [jnp.log(10.0).round(3), 0.0], [0.0, jnp.log(10.0).round(3)]]
    True
    """
    logits, labels, gates = _stack(logits), jnp.asarray(labels), jnp.asarray(gates)
    num_nodes = logits.shape[0]
    chex.assert_rank([logits, labels], [3, 1])
    chex.assert_shape(gates, (num_nodes, num_nodes))

    senders = jax.lax.stop_gradient(logits)
    weights = gate_weights(gates, progress, jnp.argmax(senders, axis=-1) == labels)

    def row_losses(receiver: jax.Array, row_gates: jax.Array) -> jax.Array:
        # A cut edge compares the receiver with itself, not with its sender: 0 times the loss of a
        # sender that has diverged would be NaN, and a cut edge must be as good as none.
        is_cut = (row_gates == CUTOFF)[:, None, None]
        seen = jnp.where(is_cut, jax.lax.stop_gradient(receiver), senders)
        return jax.vmap(lambda sender: kl_divergence(receiver, sender, temperature))(seen)

    transfer = jax.vmap(row_losses)(logits, gates)
    label = jax.vmap(cross_entropy, in_axes=(0, None))(logits, labels)
    on_diagonal = jnp.eye(num_nodes, dtype=bool)[:, :, None]
    losses = jnp.where(on_diagonal, label[:, None, :], transfer)
    return jnp.mean(weights * losses, axis=-1)


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


def _stack(logits: Logits) -> jax.Array:
    """Stacks N arrays `[B, C]` to float32 `[N, B, C]`: losses are computed in float32."""
    if isinstance(logits, list | tuple):
        logits = jnp.stack([jnp.asarray(z) for z in logits])
    return jnp.asarray(logits, jnp.float32)
