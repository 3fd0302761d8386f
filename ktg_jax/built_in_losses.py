"""The losses that edges may carry without being registered, by name."""

from collections.abc import Callable
from typing import Any

import jax

from ktg_jax.distillation_losses import (
    decoupled_kl_divergence,
    jensen_shannon_divergence,
    logit_distance,
    probability_cosine,
    smoothed_cross_entropy,
    standardised_kl_divergence,
)
from ktg_jax.edge_loss import EdgeLoss, NamedLoss, Option, per_sample
from ktg_jax.losses import cross_entropy, kl_divergence, reverse_kl_divergence
from ktg_jax.outputs import Outputs
from ktg_jax.relational_losses import contrastive_loss, correlation_loss, similarity_loss
from ktg_jax.stage_losses import attention_losses, attention_products, feature_losses

_WITHIN = "above 0 and below 1", lambda value: 0 < value < 1
_POSITIVE = "above 0", lambda value: value > 0
_NOT_NEGATIVE = "at least 0", lambda value: value >= 0


def _of_labels(losses: Callable[..., jax.Array], **options: Option) -> NamedLoss:
    """A loss of the receiver's logits and the labels."""

    def each(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any, **o: Any) -> Any:
        return losses(receiver.logits, labels, **o)

    return NamedLoss(per_sample(each), True, uses_temperature=False, options=options)


def _of_logits(losses: Callable[..., jax.Array], with_temperature: bool = True) -> EdgeLoss:
    """A loss of both nodes' logits, one number a sample."""

    def each(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any, **o: Any) -> Any:
        given = (temperature,) if with_temperature else ()
        return losses(receiver.logits, sender.logits, *given, **o)

    return per_sample(each)


def _of_stages(losses: Callable[..., jax.Array], last: bool = False) -> NamedLoss:
    """A loss of both nodes' stages, or of the last of them alone, one number a sample."""

    def each(receiver: Outputs, sender: Outputs, labels: Any, temperature: Any) -> Any:
        ends = receiver.stages, sender.stages
        return losses(*(end[-1:] if last else end for end in ends))

    return NamedLoss(per_sample(each), needs_stages=True, uses_temperature=False)


def _of_batch(losses: Callable[..., jax.Array], **options: Option) -> NamedLoss:
    """A loss of both nodes' stages, one number a batch."""

    def whole(
        receiver: Outputs, sender: Outputs, labels: Any, weights: Any, temperature: Any, **o: Any
    ) -> Any:
        return losses(receiver.stages, sender.stages, weights, **o)

    return NamedLoss(whole, needs_stages=True, uses_temperature=False, options=options)


def _decoupled(
    receiver: Outputs, sender: Outputs, labels: Any, temperature: Any, **o: Any
) -> jax.Array:
    return decoupled_kl_divergence(receiver.logits, sender.logits, labels, temperature, **o)


def _dist(
    receiver: Outputs, sender: Outputs, labels: Any, weights: Any, temperature: Any, **o: Any
) -> jax.Array:
    return correlation_loss(receiver.logits, sender.logits, temperature, weights, **o)


BUILT_IN: dict[str, NamedLoss] = {
    "cross_entropy": _of_labels(cross_entropy),
    "smoothed_cross_entropy": _of_labels(
        smoothed_cross_entropy,
        smoothing=Option(0.1, "at least 0 and below 1", lambda value: 0 <= value < 1),
    ),
    "kl": NamedLoss(_of_logits(kl_divergence)),
    "reverse_kl": NamedLoss(_of_logits(reverse_kl_divergence)),
    "jensen_shannon": NamedLoss(
        _of_logits(jensen_shannon_divergence), options={"beta": Option(0.5, *_WITHIN)}
    ),
    "decoupled_kl": NamedLoss(
        per_sample(_decoupled),
        options={"alpha": Option(1.0, *_NOT_NEGATIVE), "beta": Option(8.0, *_NOT_NEGATIVE)},
    ),
    "standardised_kl": NamedLoss(_of_logits(standardised_kl_divergence)),
    "dist": NamedLoss(
        _dist, options={"beta": Option(1.0, *_NOT_NEGATIVE), "gamma": Option(1.0, *_NOT_NEGATIVE)}
    ),
    "mse": NamedLoss(_of_logits(logit_distance, False), uses_temperature=False),
    "minus_probability": NamedLoss(_of_logits(probability_cosine)),
    "attention": _of_stages(attention_losses),
    "last_attention": _of_stages(attention_losses, last=True),
    "minus_attention": _of_stages(attention_products, last=True),
    "features": _of_stages(feature_losses),
    "similarity": _of_batch(similarity_loss),
    "contrastive": _of_batch(contrastive_loss, tau=Option(0.1, *_POSITIVE)),
}
"""Of transfer edges and of label edges, in the order in which they are listed."""
