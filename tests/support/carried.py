"""Edges that carry certain losses, for tests of losses and steps."""

from typing import Any

import jax
import jax.numpy as jnp

import ktg_jax as ktg
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.outputs import Outputs

Weights = dict[str, float]
"""The weight of each loss, on all edges that may carry it."""


def carrying(gates: Any, weights: Weights, temperature: float = 1.0) -> EdgeArrays:
    """These gates, through which edges carry losses of these weights."""
    each = jnp.array(list(weights.values()), jnp.float32)[:, None, None]
    everywhere = jnp.broadcast_to(each, (len(weights), *jnp.shape(gates)))
    return edge_arrays(gates, temperature, tuple(weights), everywhere)


def outputs(logits: Any, stages: Any) -> list[Outputs]:
    """What nodes put out."""
    return [Outputs(z, tuple(s)) for z, s in zip(logits, stages, strict=True)]


@jax.jit
def stage_edge_losses(
    stages: Any, logits: Any, labels: Any, progress: Any, edges: EdgeArrays
) -> jax.Array:
    """The edge losses of nodes that put out these stages and logits."""
    return ktg.edge_losses(outputs(logits, stages), labels, edges, progress)
