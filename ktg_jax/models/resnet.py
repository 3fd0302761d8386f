"""ResNets for small images (He et al., 2016, section 4.2): basic blocks, option A shortcuts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.models.layers import CLASSIFIER_INIT, BatchNormRelu, conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free (option A) shortcut."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, ceil(H/stride), ceil(W/stride), features]`."""
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = BatchNormRelu(self.dtype, self.axis_name, name="norm1")(y, train)
        y = conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        shortcut = x[:, :: self.stride, :: self.stride]
        new_channels = self.features - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return BatchNormRelu(self.dtype, self.axis_name, name="norm2")(y, train, shortcut)


class ResNet(nn.Module):
    """A ResNet of 6n + 2 layers: three stages of n blocks, global average pooling, a classifier.

    The last block of stage g is the submodule `stage<g>_block<n>`.

    Attributes:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...
        num_classes: number of logits.
        width: channels of the first stage, of which the second has twice and the third four times
            as many; the paper's: 16.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    depth: int
    num_classes: int
    width: int = 16
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]`, to logits, `[B, num_classes]`."""
        x = conv(self.width, 3, dtype=self.dtype, name="stem_conv")(images)
        x = BatchNormRelu(self.dtype, self.axis_name, name="stem_norm")(x, train)
        for stage in (1, 2, 3):
            features = self.width * 2 ** (stage - 1)
            for block in range(1, (self.depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(features, stride, self.dtype, self.axis_name, name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes, kernel_init=CLASSIFIER_INIT, dtype=self.dtype, name="classifier"
        )(x)
