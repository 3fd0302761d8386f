"""What the gates of a graph give each sample, by progress, by who is right, and by outputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.gates import gate_functions, gate_names, gate_weights
from ktg_jax.losses import is_correct
from ktg_jax.outputs import Outputs, detached


def gated_weights(
    edges: EdgeArrays,
    outputs: Sequence[Outputs],
    labels: jax.Array,
    progress: ArrayLike,
) -> jax.Array:
    """What each edge's gate gives each sample.

    Args:
        edges: with the gates.
        outputs: of all nodes; one with other classes than the first is never right.
        labels: int `[...]`.
        progress: scalar in [0, 1].

    Returns:
        float32 `[N, N, ...]`, detached.
    """
    n = len(outputs)
    classes = outputs[0].logits.shape[-1]
    right = jnp.stack(
        [
            is_correct(z, labels) if z.shape[-1] == classes else jnp.zeros(labels.shape, bool)
            for z, *_ in outputs
        ]
    )
    weights = gate_weights(edges.gates, progress, right.reshape(n, -1))
    weights = weights.reshape(n, n, *labels.shape)
    if edges.functions:
        weights = _with_gate_functions(weights, edges, outputs, right, progress)
    return weights


def _with_gate_functions(
    weights: jax.Array,
    edges: EdgeArrays,
    outputs: Sequence[Outputs],
    right: jax.Array,
    progress: ArrayLike,
) -> jax.Array:
    """The weights, those of registered functions filled in."""
    codes = jnp.asarray(edges.gates)
    for name in edges.functions:
        gate, code = gate_functions()[name], gate_names().index(name)
        rows = []
        for t, receiver in enumerate(outputs):
            row = []
            for s, sender in enumerate(outputs):
                sender_right = jnp.ones_like(right[s]) if s == t else right[s]
                given = (progress, right[t], sender_right, detached(receiver), detached(sender))
                row.append(jnp.broadcast_to(jax.lax.stop_gradient(gate(*given)), right.shape[1:]))
            rows.append(jnp.stack(row))
        is_this = (codes == code).reshape(*codes.shape, *(1,) * (right.ndim - 1))
        weights = jnp.where(is_this, jnp.stack(rows).astype(jnp.float32), weights)
    return weights
