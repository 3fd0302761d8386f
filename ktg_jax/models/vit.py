"""A small vision transformer for small images (Dosovitskiy et al., ICLR 2021).

As timm's: normalised before attention and before the dense layers, exact GELU, learned positions;
no class token, the mean over all patches is normalised and classified.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.models.wide_resnet import TORCH_DENSE_INIT

_INIT = nn.initializers.truncated_normal(0.02)
_EPSILON = 1e-6


class TransformerBlock(nn.Module):
    """Attention between all patches, and two dense layers for each, both as residuals.

    Attributes:
        heads: how many heads attention has.
        dtype: the dtype of the computation; parameters are float32.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps patches float `[B, h, w, C]` to `[B, h, w, C]`."""
        batch, height, width, channels = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, kernel_init=_INIT, dtype=self.dtype, name=name)

        tokens = x.reshape(batch, height * width, channels)
        y = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm1")(tokens)
        y = dense(3 * channels, "qkv")(y)
        y = y.reshape(*tokens.shape[:2], 3, self.heads, channels // self.heads)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(y, 2, 0)).reshape(tokens.shape)
        tokens = tokens + dense(channels, "projection")(y)
        y = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm2")(tokens)
        y = nn.gelu(dense(4 * channels, "dense1")(y), approximate=False)
        tokens = tokens + dense(channels, "dense2")(y)
        return tokens.reshape(x.shape)


class ViT(nn.Module):
    """A vision transformer. The last block of stage g is the submodule `stage<g>_block<n>`.

    Attributes:
        num_classes: number of logits.
        patch: height and width of a patch in pixels, which those of images are multiples of.
        features: channels of a patch.
        heads: how many heads attention has.
        stages: into how many stages the blocks are grouped, all of one resolution.
        blocks: how many blocks a stage has.
        dtype: the dtype of the computation; parameters are float32.
    """

    num_classes: int
    patch: int = 4
    features: int = 192
    heads: int = 3
    stages: int = 3
    blocks: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]`, to logits, `[B, num_classes]`.

        Raises:
            InputError: images whose sides are no multiples of the patch's.
        """
        del train  # it does the same
        if any(side % self.patch for side in images.shape[1:3]):
            allowed = f"sides that are multiples of {self.patch}, those of a patch"
            raise InputError("images", list(images.shape), allowed)
        sides = (self.patch, self.patch)
        x = nn.Conv(
            self.features,
            sides,
            sides,
            padding="VALID",
            kernel_init=TORCH_DENSE_INIT,
            dtype=self.dtype,
            name="stem_conv",
        )(images)
        position = self.param("position", _INIT, (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(x.dtype)
        for stage in range(1, self.stages + 1):
            for block in range(1, self.blocks + 1):
                x = TransformerBlock(self.heads, self.dtype, name=f"stage{stage}_block{block}")(x)
        x = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="final_norm")(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, kernel_init=_INIT, dtype=self.dtype, name="classifier")(x)
