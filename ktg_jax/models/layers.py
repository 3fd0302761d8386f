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


class BatchNormRelu(nn.Module):
    """Batch normalisation over all axes but the last, and relu; agrees with the authors' (PyTorch).

    flax's own keeps the biased batch variance in its running statistics; PyTorch keeps the
    unbiased one, which in a small batch of a network's last stage differs by several per cent.
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
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        stored_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        if self.is_initializing():
            return x.astype(self.dtype)  # of which only the shape matters now
        if not train:
            stored = stored_mean.value, stored_var.value
            return normalize_relu(
                x, scale, bias, stored, shortcut, epsilon=self.epsilon, dtype=self.dtype
            )
        y, (mean, var) = batch_norm_relu(
            x,
            scale,
            bias,
            shortcut,
            shift=stored_mean.value,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        count = x.size // x.shape[-1]
        if self.axis_name is not None:
            count *= jax.lax.axis_size(self.axis_name)
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((stored_mean, mean), (stored_var, unbiased)):
            new = new.astype(running.value.dtype)
            running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y
