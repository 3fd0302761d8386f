"""A small convolutional network, for tests, tutorials and images as small as 8x8."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.models.layers import CLASSIFIER_INIT, BatchNormRelu, conv


class CNN(nn.Module):
    """Three 3x3 convolutions (16, 32 and 64 channels), each a stage, and a classifier.

    Attributes:
        num_classes: number of logits.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]`, to logits, `[B, num_classes]`."""
        x = images
        for stage, features in enumerate((16, 32, 64), start=1):
            stride = 1 if stage == 1 else 2
            x = conv(features, 3, stride, dtype=self.dtype, name=f"stage{stage}_conv")(x)
            x = BatchNormRelu(self.dtype, self.axis_name, name=f"stage{stage}_norm")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes, kernel_init=CLASSIFIER_INIT, dtype=self.dtype, name="classifier"
        )(x)
