"""ResNets whose shortcuts are projections (He et al., 2016, option B), for small images.

The networks of distillation papers: three stages of basic blocks (`resnet8x4`, `resnet32x4`), and
ImageNet's with four (`resnet18`, `resnet34`, `resnet50`), their stem a 3x3 convolution of stride 1
without pooling.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.models.layers import BatchNorm, BatchNormRelu, conv
from ktg_jax.models.wide_resnet import TORCH_DENSE_INIT


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions, or the 1x1, 3x3 and 1x1 ones of a bottleneck, and a shortcut.

    The shortcut is a normalised 1x1 convolution where the shape changes.

    Attributes:
        features: channels of the result; of a bottleneck a quarter of them lies within.
        stride: of the first 3x3 convolution, and of the shortcut.
        bottleneck: whether it is one.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    features: int
    stride: int = 1
    bottleneck: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, ceil(H/stride), ceil(W/stride), features]`."""
        inner = self.features // 4 if self.bottleneck else self.features
        convolutions = [(inner, 3, self.stride), (inner, 3, 1)]
        if self.bottleneck:
            convolutions = [(inner, 1, 1), (inner, 3, self.stride), (self.features, 1, 1)]
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(x)
            norm = BatchNorm(self.dtype, self.axis_name, name="shortcut_norm")
            shortcut = norm(shortcut, train)
        y = x
        for i, (features, size, stride) in enumerate(convolutions, start=1):
            y = conv(features, size, stride, dtype=self.dtype, name=f"conv{i}")(y)
            norm_relu = BatchNormRelu(self.dtype, self.axis_name, name=f"norm{i}")
            y = norm_relu(y, train, shortcut if i == len(convolutions) else None)
        return y


class ProjectedResNet(nn.Module):
    """A ResNet with projections as shortcuts, global average pooling and a classifier.

    The last block of stage g is the submodule `stage<g>_block<n>`.

    Attributes:
        blocks: how many blocks each stage has; from the second stage on the first has stride 2.
        widths: the channels that each stage puts out.
        stem: the channels of the stem.
        num_classes: number of logits.
        bottleneck: whether blocks are bottlenecks.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    stem: int
    num_classes: int
    bottleneck: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images, float `[B, H, W, C]`, to logits, `[B, num_classes]`."""
        x = conv(self.stem, 3, dtype=self.dtype, name="stem_conv")(images)
        x = BatchNormRelu(self.dtype, self.axis_name, name="stem_norm")(x, train)
        stages = zip(self.blocks, self.widths, strict=True)
        for stage, (blocks, features) in enumerate(stages, start=1):
            for block in range(1, blocks + 1):
                x = ProjectedBlock(
                    features,
                    stride=2 if stage > 1 and block == 1 else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes, kernel_init=TORCH_DENSE_INIT, dtype=self.dtype, name="classifier"
        )(x)


def small_resnet(depth: int, factor: int, num_classes: int) -> ProjectedResNet:
    """The network `resnet<depth>x<factor>`: 6n + 2 layers, a factor times the paper's channels.

    Its stem has 8 channels times the factor (16 for a factor of 1), as in the networks that CRD
    (Tian et al., ICLR 2020) made common.
    """
    widths = (16 * factor, 32 * factor, 64 * factor)
    stem = max(8 * factor, 16)
    return ProjectedResNet(((depth - 2) // 6,) * 3, widths, stem, num_classes)


IMAGENET = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
"""Blocks of each stage, and whether they are bottlenecks."""


def imagenet_resnet(name: str, num_classes: int) -> ProjectedResNet:
    """A network of `IMAGENET`, for small images."""
    blocks, bottleneck = IMAGENET[name]
    widths = (256, 512, 1024, 2048) if bottleneck else (64, 128, 256, 512)
    return ProjectedResNet(blocks, widths, 64, num_classes, bottleneck)
