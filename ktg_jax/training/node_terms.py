"""What steers a node beside its edges: priors, as the training step knows them."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.models.network import PyTree
from ktg_jax.training.state import GraphState


class NodeTerm(Protocol):
    """What steers a node by its own parameters alone, such as `ktg_jax.NodePrior`. A pytree."""

    def add_to(
        self, gradients: PyTree, params: PyTree, progress: ArrayLike
    ) -> tuple[PyTree, jax.Array]:
        """Returns the gradients with its own added, and distances to report, float32 `[G]`."""


Priors = Sequence[NodeTerm | None]


def checked_priors(priors: Priors | None, state: GraphState) -> Priors:
    """The priors, one entry a node; raises InputError as `train_step` describes."""
    if priors is None:
        return (None,) * len(state.params)
    if len(priors) != len(state.params):
        raise InputError("priors", len(priors), f"{len(state.params)} entries, one a node")
    for i in state.frozen:
        if priors[i] is not None:
            raise InputError(f"priors[{i}]", type(priors[i]).__name__, "None: the node is frozen")
    return priors


def absent() -> float:
    """What stands for a number that is not there: NaN; -1 where `jax_debug_nans` bars NaN."""
    return -1.0 if jax.config.jax_debug_nans else jnp.nan  # type: ignore[attr-defined]


def distance_metrics(distances: Sequence[jax.Array | None]) -> dict[str, jax.Array]:
    """The metric `prior_distance` from each node's distances; none where no node has any.

    For what is not there `absent` stands.

    >>> distance_metrics([None, jnp.array([1.0, 2.0])])["prior_distance"].tolist()
    [[nan, nan], [1.0, 2.0]]
    """
    stages = max((len(distance) for distance in distances if distance is not None), default=0)
    if not stages:
        return {}

    def padded(row: jax.Array) -> jax.Array:
        return jnp.pad(row, (0, stages - len(row)), constant_values=absent())

    none = jnp.zeros(0, jnp.float32)
    return {"prior_distance": jnp.stack([padded(none if d is None else d) for d in distances])}
