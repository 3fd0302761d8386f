"""Networks for small devices, torchvision's of width 1, with smaller strides for small images.

MobileNetV2 (Sandler et al., CVPR 2018) and ShuffleNetV2 (Ma et al., ECCV 2018).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.models.layers import CONV_INIT, BatchNorm, BatchNormRelu, conv
from ktg_jax.models.wide_resnet import TORCH_DENSE_INIT


def depthwise(channels: int, stride: int, *, dtype: Any, name: str) -> nn.Conv:
    """A 3x3 convolution of each channel by itself, without bias, padded evenly on both sides."""
    return nn.Conv(
        channels,
        (3, 3),
        (stride, stride),
        padding=1,
        feature_group_count=channels,
        use_bias=False,
        kernel_init=CONV_INIT,
        dtype=dtype,
        name=name,
    )


class InvertedResidual(nn.Module):
    """A wider 1x1 convolution, a depthwise one, and a 1x1 one without activation (MobileNetV2).

    Attributes:
        features: channels of the result.
        stride: of the depthwise convolution.
        expansion: how many times as many channels lie within; 1: the first convolution is left out.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    features: int
    stride: int = 1
    expansion: int = 6
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, ceil(H/stride), ceil(W/stride), features]`."""
        inner, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = conv(inner, 1, dtype=self.dtype, name="conv1")(y)
            y = nn.relu6(BatchNorm(self.dtype, self.axis_name, name="norm1")(y, train))
        y = depthwise(inner, self.stride, dtype=self.dtype, name="conv2")(y)
        y = nn.relu6(BatchNorm(self.dtype, self.axis_name, name="norm2")(y, train))
        y = conv(self.features, 1, dtype=self.dtype, name="conv3")(y)
        y = BatchNorm(self.dtype, self.axis_name, name="norm3")(y, train)
        return x + y if x.shape == y.shape else y


class _Group(NamedTuple):
    """Blocks of one shape, and the stage (of one resolution) that they are in."""

    stage: int
    features: int
    number: int
    stride: int = 1
    expansion: int = 6


_GROUPS = (
    _Group(1, 16, 1, expansion=1),
    _Group(1, 24, 2),
    _Group(2, 32, 3, stride=2),
    _Group(3, 64, 4, stride=2),
    _Group(3, 96, 3),
    _Group(4, 160, 3, stride=2),
    _Group(4, 320, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2: the stem and the blocks of 24 channels have stride 1; no dropout.

    The last block of stage g, of which there are four, is the submodule `stage<g>_block<n>`.

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
        x = conv(32, 3, dtype=self.dtype, name="stem_conv")(images)
        x = nn.relu6(BatchNorm(self.dtype, self.axis_name, name="stem_norm")(x, train))
        blocks = [0] * (_GROUPS[-1].stage + 1)
        for group in _GROUPS:
            for i in range(group.number):
                blocks[group.stage] += 1
                x = InvertedResidual(
                    group.features,
                    group.stride if i == 0 else 1,
                    group.expansion,
                    self.dtype,
                    self.axis_name,
                    name=f"stage{group.stage}_block{blocks[group.stage]}",
                )(x, train)
        x = conv(1280, 1, dtype=self.dtype, name="final_conv")(x)
        x = nn.relu6(BatchNorm(self.dtype, self.axis_name, name="final_norm")(x, train))
        x, init = jnp.mean(x, axis=(1, 2)), nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="classifier")(x)


class ShuffleBlock(nn.Module):
    """Half of the channels, or with stride 2 all of them twice, through depthwise convolutions.

    The channels of both branches then alternate.

    Attributes:
        features: channels of the result.
        stride: 1, where x has as many channels, or 2.
        dtype: the dtype of the computation; parameters are float32.
        axis_name: as in `BatchNormRelu`.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps float `[B, H, W, C]` to `[B, ceil(H/stride), ceil(W/stride), features]`."""
        half, how = self.features // 2, (self.dtype, self.axis_name)
        if self.stride == 1:
            first, y = jnp.split(x, 2, axis=-1)
        else:
            first = depthwise(x.shape[-1], self.stride, dtype=self.dtype, name="side_conv1")(x)
            first = BatchNorm(*how, name="side_norm1")(first, train)
            first = conv(half, 1, dtype=self.dtype, name="side_conv2")(first)
            first, y = BatchNormRelu(*how, name="side_norm2")(first, train), x
        y = conv(half, 1, dtype=self.dtype, name="conv1")(y)
        y = BatchNormRelu(*how, name="norm1")(y, train)
        y = depthwise(half, self.stride, dtype=self.dtype, name="conv2")(y)
        y = BatchNorm(*how, name="norm2")(y, train)
        y = conv(half, 1, dtype=self.dtype, name="conv3")(y)
        y = BatchNormRelu(*how, name="norm3")(y, train)
        return jnp.stack([first, y], axis=-1).reshape(*y.shape[:-1], self.features)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2: the stem has stride 1, and no pooling behind it.

    The last block of stage g, of which there are three, is the submodule `stage<g>_block<n>`.

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
        how = (self.dtype, self.axis_name)
        x = conv(24, 3, dtype=self.dtype, name="stem_conv")(images)
        x = BatchNormRelu(*how, name="stem_norm")(x, train)
        for stage, (number, features) in enumerate(((4, 116), (8, 232), (4, 464)), start=1):
            for i in range(1, number + 1):
                name = f"stage{stage}_block{i}"
                x = ShuffleBlock(features, 2 if i == 1 else 1, *how, name=name)(x, train)
        x = conv(1024, 1, dtype=self.dtype, name="final_conv")(x)
        x = jnp.mean(BatchNormRelu(*how, name="final_norm")(x, train), axis=(1, 2))
        return nn.Dense(
            self.num_classes, kernel_init=TORCH_DENSE_INIT, dtype=self.dtype, name="classifier"
        )(x)
