"""Nodes that are others together, or others' average: what they put out, and how they move."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.graph.derived import Ensemble
from ktg_jax.models.network import PyTree
from ktg_jax.outputs import Outputs


def combined(logits: Sequence[Any], of: str) -> jax.Array:
    """The logits of an ensemble (KTG's authors' code; Okamoto et al., 2021).

    Args:
        logits: of its members, float `[..., C]` each.
        of: "logits": their sum; "probabilities": the logarithm of the mean probabilities.

    Returns:
        float32 `[..., C]`.

    >>> two = [jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))]
    >>> [round(float(p), 3) for p in jnp.exp(combined(two, "probabilities"))]
    [0.7, 0.3]
    """
    stacked = jnp.stack([jnp.asarray(z, jnp.float32) for z in logits])
    if of == "logits":
        return jnp.sum(stacked, axis=0)
    return jax.nn.logsumexp(jax.nn.log_softmax(stacked), axis=0) - jnp.log(len(logits))


def with_ensembles(outputs: Sequence[Any], ensembles: Sequence[Ensemble]) -> list[Any]:
    """All nodes' outputs, those of ensembles filled in.

    Args:
        outputs: logits or `Outputs` by node; of ensembles anything. None: a node has none.
        ensembles: as in `Derived`.

    Returns:
        The ensembles' in the form of the others'; None where a member has none.
    """
    found = list(outputs)
    for ensemble in ensembles:
        members = [found[member] for member in ensemble.members]
        if any(member is None for member in members):
            found[ensemble.node] = None
            continue
        are_whole = isinstance(members[0], Outputs)
        logits = combined([m.logits if are_whole else m for m in members], ensemble.of)
        found[ensemble.node] = Outputs(logits) if are_whole else logits
    return found


def moved(average: PyTree, new: PyTree, decay: float) -> PyTree:
    """An exponential moving average after a step: decay * average + (1 - decay) * new.

    What is no float, as a random key is not, stays as it is.

    >>> moved({"w": jnp.array(1.0)}, {"w": jnp.array(0.0)}, 0.75)["w"].tolist()
    0.75
    """

    def move(old: jax.Array, other: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.asarray(old).dtype, jnp.inexact):
            return old
        return (decay * old + (1 - decay) * other).astype(old.dtype)

    return jax.tree.map(move, average, new)
