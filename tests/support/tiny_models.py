"""Networks that compile in a moment; importing this module registers them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import ktg_jax as ktg
from ktg_jax.models.layers import BatchNormRelu

HIDDEN = 16


class Tiny(nn.Module):
    """A hidden layer with batch statistics; smaller than any other model's."""

    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        init = nn.initializers.uniform(0.5)
        x = images.reshape(len(images), -1)
        x = nn.Dense(HIDDEN, kernel_init=init, dtype=self.dtype, name="hidden")(x)
        x = BatchNormRelu(self.dtype, self.axis_name, name="norm")(x, train)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="classifier")(x)


class Staged(nn.Module):
    """Two convolutions, each a stage of its own."""

    num_classes: int
    widths: tuple[int, int] = (4, 6)
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), strides=2, use_bias=False, name="stage1_conv")(images)
        x = BatchNormRelu(jnp.float32, self.axis_name, name="norm")(x, train)
        x = nn.Conv(self.widths[1], (1, 1), use_bias=False, name="stage2_conv")(nn.relu(x))
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


class Dropping(nnx.Module):
    """Batch statistics and a random stream."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.uniform(0.5)
        self.hidden = nnx.Linear(64, HIDDEN, kernel_init=init, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.classifier = nnx.Linear(HIDDEN, num_classes, kernel_init=init, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.hidden(images.reshape(len(images), -1))))
        return self.classifier(self.dropout(x))


class Regularised(nn.Module):
    """Dropout and batch statistics, as other people's networks have them."""

    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        x = nn.Dense(16, dtype=self.dtype, name="hidden")(images.reshape(len(images), -1))
        x = nn.BatchNorm(not training, axis_name=self.axis_name, dtype=self.dtype, name="norm")(x)
        x = nn.Dropout(0.3, deterministic=not training)(nn.relu(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)


class Failing(nn.Module):
    """As good as any in its first steps; then its logits are infinite."""

    num_classes: int
    good_steps: int = 12

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        count = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
        logits = Tiny(self.num_classes, name="tiny")(images, train)
        if train:
            count.value += 1
            logits = jnp.where(count.value > self.good_steps, jnp.inf, logits)
        return logits


def dropping(num_classes: int) -> ktg.NodeFns:
    return ktg.from_nnx(Dropping, num_classes)


ktg.register_model("tiny", Tiny)
ktg.register_model("staged", Staged)
ktg.register_model("staged_wide", lambda num_classes: Staged(num_classes, (8, 12)))
ktg.register_model("dropping", dropping)
ktg.register_model("regularised", Regularised)
ktg.register_model("failing", Failing)
