"""What a loss of an edge is.

A loss of an edge is a function `loss(receiver, sender, labels, sample_weights, temperature)`:

- `receiver` and `sender`: `Outputs`; the sender is detached before the loss sees it.
- `labels`: int `[...]`, the batch's shape, usually `[B]`.
- `sample_weights`: float32 `[...]`, what the edge's gate gives each sample, scaled so that a plain
  mean over the batch is the mean over the samples that count (masked ones have weight 0).
- `temperature`: float32 scalar T > 0.

It returns a float32 scalar. Most losses are one number a sample, and `per_sample` makes a loss of
such a function; relational ones see the whole batch. Options of a loss are further arguments, by
their names.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from ktg_jax.outputs import Outputs

EdgeLoss: TypeAlias = Callable[..., jax.Array]
SampleLoss: TypeAlias = Callable[..., jax.Array]


class Option(NamedTuple):
    """An option of a loss.

    Attributes:
        default: its value where it is not given.
        says: which numbers are allowed, in words.
        allows: whether a finite number is allowed.
    """

    default: float
    says: str = "a finite number"
    allows: Callable[[float], bool] = math.isfinite


class NamedLoss(NamedTuple):
    """A registered loss.

    Attributes:
        function: as the module's text says.
        on_labels: whether label edges carry it; else transfer edges do.
        needs_stages: whether it compares stage outputs.
        uses_temperature: whether the temperature changes it.
        options: its options by their names.
    """

    function: EdgeLoss
    on_labels: bool = False
    needs_stages: bool = False
    uses_temperature: bool = True
    options: Mapping[str, Option] = {}

    @property
    def is_per_sample(self) -> bool:
        """Whether `per_sample` made it: the loss of a batch is the mean of its parts' losses."""
        function = getattr(self.function, "func", self.function)  # behind options
        return getattr(function, "is_per_sample", False)


def per_sample(losses: SampleLoss) -> EdgeLoss:
    """The loss of an edge, from a function that gives one number a sample.

    Args:
        losses: `losses(receiver, sender, labels, temperature)` -> float `[...]`, the batch's shape.
            The options of the loss, if any, are further arguments by their names.

    >>> loss = per_sample(lambda receiver, sender, labels, temperature: receiver.logits[:, 0])
    >>> output = Outputs(jnp.array([[1.0], [2.0]]))
    >>> float(loss(output, output, jnp.zeros(2, int), jnp.array([1.0, 0.5]), jnp.ones(())))
    1.0
    """

    def loss(
        receiver: Outputs,
        sender: Outputs,
        labels: jax.Array,
        sample_weights: jax.Array,
        temperature: jax.Array,
        **options: Any,
    ) -> jax.Array:
        found = losses(receiver, sender, labels, temperature, **options)
        chex.assert_equal_shape([found, sample_weights])
        # What a gate weighs 0 adds 0 where it is infinite, too; NaN is to be seen.
        found = jnp.where((sample_weights == 0) & (found == jnp.inf), 0.0, found)
        return jnp.mean(sample_weights * found)

    loss.is_per_sample = True  # type: ignore[attr-defined]
    return loss
