"""The gradients of a whole graph, on what its nodes put out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.losses import is_correct
from ktg_jax.means import mean_of
from ktg_jax.mixed import Mixed
from ktg_jax.outputs import all_outputs
from ktg_jax.training.node_terms import absent
from ktg_jax.transfer import edge_losses

Metrics = dict[str, jax.Array]


def graph_gradients(
    logits: Sequence[Any],
    labels: ArrayLike,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    connectors: Sequence[Mapping[str, Any]] | None = None,
    mixed: Mixed | None = None,
) -> tuple[Any, Metrics]:
    """Each node's own loss and its gradient with respect to what that node puts out.

    Args:
        logits: N arrays, float `[..., C]`, or N `Outputs`, where edges carry losses on stages.
        labels: int `[...]`, the batch's shape.
        gates: as for `edge_losses`.
        progress: scalar in [0, 1], as for `edge_losses`.
        temperature: as for `edge_losses`.
        where: as for `edge_losses`.
        axis_name: as for `edge_losses`.
        connectors: as for `edge_losses`.
        mixed: as for `edge_losses`.

    Returns:
        N gradients in the structure, shape and dtype of what was given for each node, where there
        are connectors a pair of these and of the connectors' own; and metrics: `loss` `[N]`,
        `accuracy` `[N]`, `edge_losses` `[N, N]`, all float32, means over what counts. The accuracy
        of a node with other classes than the first is NaN (-1 under `jax_debug_nans`).

    Raises:
        InputError: as `edge_losses`.
        AssertionError: as `edge_losses`.

    >>> logits = [jnp.zeros((1, 2)), jnp.zeros((1, 2))]
    >>> gradients, metrics = graph_gradients(logits, jnp.array([0]), jnp.zeros((2, 2), int), 1.0)
    >>> gradients[0].tolist(), metrics["accuracy"].tolist()
    ([[-0.5, 0.5]], [1.0, 1.0])
    """

    def loss_of(given: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        outputs, behind = given
        inputs = outputs, labels, gates, progress, temperature
        how: dict[str, Any] = {"where": where, "axis_name": axis_name, "mixed": mixed}
        losses = edge_losses(*inputs, connectors=behind, **how)
        return jnp.sum(losses), losses

    both, losses = jax.grad(loss_of, has_aux=True)((tuple(logits), connectors))
    gradients = both[0] if connectors is None else both

    def accuracy_of(z: jax.Array) -> jax.Array:
        if z.shape[-1] != classes:
            return jnp.asarray(absent(), jnp.float32)
        return mean_of(is_correct(z, labels).astype(jnp.float32), where, axis_name)

    outputs = all_outputs(logits)
    classes = outputs[0].logits.shape[-1]
    accuracy = jnp.stack([accuracy_of(output.logits) for output in outputs])
    metrics = {"loss": jnp.sum(losses, axis=1), "accuracy": accuracy, "edge_losses": losses}
    return gradients, metrics
