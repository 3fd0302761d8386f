"""The losses that edges may carry, by name.

A loss of an edge is a function `loss(receiver, sender, labels, sample_weights, temperature)`:

- `receiver` and `sender`: `Outputs`; the sender is detached before the loss sees it.
- `labels`: int `[...]`, the batch's shape, usually `[B]`.
- `sample_weights`: float32 `[...]`, what the edge's gate gives each sample, scaled so that a plain
  mean over the batch is the mean over the samples that count (masked ones have weight 0).
- `temperature`: float32 scalar T > 0.

It returns a float32 scalar. Most losses are one number a sample, and `per_sample` makes a loss of
such a function; relational ones see the whole batch.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.losses import cross_entropy, kl_divergence, reverse_kl_divergence
from ktg_jax.outputs import Outputs
from ktg_jax.stage_losses import attention_losses, feature_losses

EdgeLoss: TypeAlias = Callable[[Outputs, Outputs, jax.Array, jax.Array, jax.Array], jax.Array]
SampleLoss: TypeAlias = Callable[[Outputs, Outputs, jax.Array, jax.Array], jax.Array]


class NamedLoss(NamedTuple):
    """A registered loss.

    Attributes:
        function: as the module's text says.
        on_labels: whether label edges carry it; else transfer edges do.
        needs_stages: whether it compares stage outputs.
        uses_temperature: whether the temperature changes it.
    """

    function: EdgeLoss
    on_labels: bool = False
    needs_stages: bool = False
    uses_temperature: bool = True


_registered: dict[str, NamedLoss] = {}
_BUILT_IN = ("cross_entropy", "kl", "reverse_kl", "attention", "features")


def register_loss(
    name: str,
    function: EdgeLoss,
    *,
    on_labels: bool = False,
    needs_stages: bool = False,
    uses_temperature: bool = True,
) -> None:
    """Makes a loss available by name, to graphs, to files and to the experiments.

    Args:
        name: letters, digits and `_`; not a built-in loss's. One that was registered before is
            replaced.
        function: `function(receiver, sender, labels, sample_weights, temperature)` -> scalar, as
            this module's text says; `per_sample` makes one of a loss for each sample. It may see a
            sender of zeros where the edge is cut, and what it returns there does not count.
        on_labels: label edges carry it, whose sender is the receiver itself, detached; else
            transfer edges do.
        needs_stages: it compares `Outputs.stages`, which are empty where no loss needs them.
        uses_temperature: whether graphs that differ in the temperature alone differ.

    Raises:
        InputError: a malformed or a built-in name, or no function.

    >>> register_loss("kl", per_sample(lambda *given: 0.0))
    Traceback (most recent call last):
    ktg_jax.errors.InputError: name: got 'kl'; allowed: a name that no built-in loss has

    Such as::

        def logit_distance(receiver, sender, labels, temperature):
            return jnp.mean((receiver.logits - sender.logits) ** 2, axis=-1)

        register_loss("logit_distance", per_sample(logit_distance), uses_temperature=False)
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise InputError("name", name, "letters, digits and '_'")
    if name in _BUILT_IN:
        raise InputError("name", name, "a name that no built-in loss has")
    if not callable(function):
        raise InputError("function", function, "a function of five arguments")
    _registered[name] = NamedLoss(function, on_labels, needs_stages, uses_temperature)


def per_sample(losses: SampleLoss) -> EdgeLoss:
    """The loss of an edge, from a function that gives one number a sample.

    Args:
        losses: `losses(receiver, sender, labels, temperature)` -> float `[...]`, the batch's shape.

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
    ) -> jax.Array:
        found = losses(receiver, sender, labels, temperature)
        chex.assert_equal_shape([found, sample_weights])
        # What a gate weighs 0 adds 0 where it is infinite, too; NaN is to be seen.
        found = jnp.where((sample_weights == 0) & (found == jnp.inf), 0.0, found)
        return jnp.mean(sample_weights * found)

    return loss


def loss_names(on_labels: bool | None = None) -> tuple[str, ...]:
    """The names that are known: of label edges, of transfer edges, or (None) all.

    >>> "kl" in loss_names(on_labels=False), loss_names(on_labels=True)[:1]
    (True, ('cross_entropy',))
    """
    return tuple(name for name, loss in _registered.items() if on_labels in (None, loss.on_labels))


def named_loss(name: str) -> NamedLoss:
    """The loss of a name.

    Raises:
        InputError: there is none.
    """
    if name not in _registered:
        raise InputError("loss", name, ", ".join(loss_names()))
    return _registered[name]


def _cross_entropy(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> jax.Array:
    return cross_entropy(receiver.logits, labels)


def _kl(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> jax.Array:
    return kl_divergence(receiver.logits, sender.logits, temperature)


def _reverse_kl(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> jax.Array:
    return reverse_kl_divergence(receiver.logits, sender.logits, temperature)


def _attention(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> jax.Array:
    return attention_losses(receiver.stages, sender.stages)


def _features(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> jax.Array:
    return feature_losses(receiver.stages, sender.stages)


_registered |= {
    "cross_entropy": NamedLoss(per_sample(_cross_entropy), on_labels=True, uses_temperature=False),
    "kl": NamedLoss(per_sample(_kl)),
    "reverse_kl": NamedLoss(per_sample(_reverse_kl)),
    "attention": NamedLoss(per_sample(_attention), needs_stages=True, uses_temperature=False),
    "features": NamedLoss(per_sample(_features), needs_stages=True, uses_temperature=False),
}
