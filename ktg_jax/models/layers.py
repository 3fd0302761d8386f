"""Layers that the built-in networks share, as the authors' networks have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ktg_jax.cpu.convolution import conv_general_dilated
from ktg_jax.cpu.normalization import batch_norm_relu, normalize_relu

# Authors' initialisers: He-normal by fan-out for convolutions, by fan-in for the classifier.
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
CLASSIFIER_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(features: int, size: int, stride: int = 1, *, dtype: Any, name: str) -> nn.Conv:
    """A size x size convolution without bias, padded evenly on both sides.

    flax's own `SAME` pads a strided convolution on one side only where the image size is even.
    """
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=CONV_INIT,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def _statistics(module: nn.Module, features: int) -> tuple[nn.Variable, nn.Variable]:
    """The running mean and variance of a batch normalisation."""
    shape = (features,)
    return (
        module.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
        module.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
    )


def _update(
    running: tuple[nn.Variable, nn.Variable],
    batch: tuple[jax.Array, jax.Array],
    count: int,
    momentum: float,
    axis_name: str | None,
) -> None:
    """Moves running statistics towards those of a batch, the variance without its bias.

    flax's own keeps the biased batch variance; PyTorch keeps the unbiased one, which in a small
    batch of a network's last stage differs by several per cent.
    """
    if axis_name is not None:
        count *= jax.lax.axis_size(axis_name)
    mean, var = batch
    unbiased = var * (count / max(count - 1, 1))
    for stored, new in zip(running, (mean, unbiased), strict=True):
        new = new.astype(stored.value.dtype)
        stored.value = momentum * stored.value + (1 - momentum) * new


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; agrees with PyTorch's.

    Parameters and running statistics are float32 whatever `dtype` is; statistics are computed in
    float32, or in float64 where x is.

    Attributes:
        dtype: the dtype of the result.
        axis_name: a mapped axis (`jax.pmap`) over which the batch is spread, or None.
        momentum: share of the running statistics that a step keeps.
        epsilon: added to the variance.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x, float `[..., C]`, by the batch's statistics if `train`, else the stored."""
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        running = _statistics(self, features)
        if self.is_initializing():
            return x.astype(self.dtype)  # of which only the shape matters now
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = running[0].value, running[1].value
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axis=axes)
            if self.axis_name is not None:
                mean = jax.lax.pmean(mean, self.axis_name)
            var = jnp.mean(jnp.square(x - mean), axis=axes)
            if self.axis_name is not None:
                var = jax.lax.pmean(var, self.axis_name)
            count = x.size // features
            _update(running, (mean, var), count, self.momentum, self.axis_name)
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * factor + bias).astype(self.dtype)


class BatchNormRelu(nn.Module):
    """Batch normalisation over all axes but the last, and relu; agrees with the authors' (PyTorch).

    Parameters and running statistics are float32 whatever `dtype` is; statistics are computed in
    float32, or in float64 where x is.

    Attributes:
        dtype: the dtype of the result.
        axis_name: a mapped axis (`jax.pmap`) over which the batch is spread, or None.
        momentum: share of the running statistics that a step keeps.
        epsilon: added to the variance.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, shortcut: jax.Array | None = None) -> jax.Array:
        """relu(x normalised + shortcut), by the batch's statistics if `train`, else the stored.

        x and the shortcut, if any, are float `[..., C]`.
        """
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        running = _statistics(self, x.shape[-1])
        if self.is_initializing():
            return x.astype(self.dtype)  # of which only the shape matters now
        if not train:
            stored = running[0].value, running[1].value
            return normalize_relu(
                x, scale, bias, stored, shortcut, epsilon=self.epsilon, dtype=self.dtype
            )
        y, (mean, var) = batch_norm_relu(
            x,
            scale,
            bias,
            shortcut,
            shift=running[0].value,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        _update(running, (mean, var), x.size // x.shape[-1], self.momentum, self.axis_name)
        return y
