"""VGG networks for small images (Simonyan & Zisserman, ICLR 2015), with batch normalisation.

As distillation papers since CRD (Tian et al., ICLR 2020) have them: five stages, global average
pooling, and one dense layer.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.cpu.convolution import conv_general_dilated
from ktg_jax.models.layers import CONV_INIT, BatchNormRelu

_WIDTHS = (64, 128, 256, 512, 512)
_SMALL = 32

BLOCKS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""How many convolutions each stage has."""


class VGGBlock(nn.Module):
    """A 3x3 convolution with bias, batch normalisation and relu."""

    features: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, H, W, features]`."""
        x = nn.Conv(
            self.features,
            (3, 3),
            padding=1,
            kernel_init=CONV_INIT,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name="conv1",
        )(x)
        return BatchNormRelu(self.dtype, self.axis_name, name="norm1")(x, train)


class VGG(nn.Module):
    """A VGG network: after each of the first three stages the image is halved.

    Of images larger than 32 pixels it is halved after the fourth, too. The last block of stage g is
    the submodule `stage<g>_block<n>`.

    Attributes:
        blocks: how many convolutions each of the five stages has.
        num_classes: number of logits.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    blocks: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]` of at least 8 pixels, to logits, `[B, num_classes]`."""
        x, halvings = images, 4 if max(images.shape[1:3]) > _SMALL else 3
        for stage, (number, features) in enumerate(zip(self.blocks, _WIDTHS, strict=True), start=1):
            for block in range(1, number + 1):
                name = f"stage{stage}_block{block}"
                x = VGGBlock(features, self.dtype, self.axis_name, name=name)(x, train)
            if stage <= halvings:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.mean(x, axis=(1, 2))
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="classifier")(x)
