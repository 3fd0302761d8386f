"""Wide ResNets (Zagoruyko & Komodakis, 2016) without dropout: pre-activation blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.models.layers import BatchNormRelu, conv

# PyTorch's default for a linear layer's weight, which the authors leave as it is here:
# uniform in +-1/sqrt(fan_in).
TORCH_DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions; a 1x1 convolution as shortcut where the width changes."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, ceil(H/stride), ceil(W/stride), features]`."""
        y = BatchNormRelu(self.dtype, self.axis_name, name="norm1")(x, train)
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(y)
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(y)
        y = BatchNormRelu(self.dtype, self.axis_name, name="norm2")(y, train)
        return shortcut + conv(self.features, 3, dtype=self.dtype, name="conv2")(y)


class WideResNet(nn.Module):
    """A wide ResNet of 6n + 4 layers: three stages of n blocks with 16w, 32w and 64w channels.

    The last block of stage g is the submodule `stage<g>_block<n>`.

    Attributes:
        depth: 6n + 4: 10, 16, 22, 28, 40, ...
        width: w.
        num_classes: number of logits.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    depth: int
    width: int
    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]`, to logits, `[B, num_classes]`."""
        x = conv(16, 3, dtype=self.dtype, name="stem_conv")(images)
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(1, (self.depth - 4) // 6 + 1):
                x = WideBlock(
                    features * self.width,
                    stride=2 if stage > 1 and block == 1 else 1,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = BatchNormRelu(self.dtype, self.axis_name, name="final_norm")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes, kernel_init=TORCH_DENSE_INIT, dtype=self.dtype, name="classifier"
        )(x)
