"""What a node puts out: logits, and what its stages saw. All that edges compare."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Outputs(NamedTuple):
    """What a node puts out. A pytree.

    Attributes:
        logits: float `[B, C]`, or `[B, ..., C]`, as tokens have them.
        stages: the output of each stage in their order, float `[B, h, w, C]` each; or none.

    >>> Outputs(jnp.zeros((4, 10))).stages
    ()
    """

    logits: Any
    stages: tuple[Any, ...] = ()


Logits: TypeAlias = ArrayLike | Sequence[ArrayLike] | Sequence[Outputs]
"""All nodes' outputs: float `[N, ..., C]`, or N arrays `[..., C]`, or N `Outputs`."""


def all_outputs(logits: Logits) -> tuple[Outputs, ...]:
    """One `Outputs` a node, its logits in float32: losses are computed in float32.

    >>> [output.logits.shape for output in all_outputs(jnp.zeros((2, 4, 10)))]
    [(4, 10), (4, 10)]
    """
    given = logits if isinstance(logits, list | tuple) else list(jnp.asarray(logits))
    outputs = [each if isinstance(each, Outputs) else Outputs(each) for each in given]
    return tuple(
        Outputs(jnp.asarray(output.logits, jnp.float32), tuple(output.stages)) for output in outputs
    )


def detached(output: Outputs) -> Outputs:
    """The same values, through which no gradient flows."""
    return jax.tree.map(jax.lax.stop_gradient, output)


def filled(condition: ArrayLike, fill: float, output: Outputs) -> Outputs:
    """The output, filled with a number where a condition holds.

    Args:
        condition: bool, a scalar or of the batch's shape.
        fill: the number.
        output: the batch's axes are the first ones of each of its arrays.

    >>> filled(jnp.array([True, False]), 0.0, Outputs(jnp.ones((2, 1)))).logits.tolist()
    [[0.0], [1.0]]
    """
    condition = jnp.asarray(condition)

    def pick(array: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        chex.assert_equal_shape_prefix([condition, array], condition.ndim)
        shaped = condition.reshape(*condition.shape, *(1,) * (array.ndim - condition.ndim))
        return jnp.where(shaped, jnp.asarray(fill, array.dtype), array)

    return jax.tree.map(pick, output)
