"""Layers that the built-in networks share, as the authors' networks have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, which agrees with the authors' (PyTorch's).

    flax's own keeps the biased batch variance in its running statistics; PyTorch keeps the
    unbiased one, which in a small batch of a network's last stage differs by several per cent.
    Statistics are computed in float32 whatever `dtype` is.

    Attributes:
        dtype: of the result.
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
        """Normalises x, float `[..., C]`, by its own statistics if `train`, else by stored ones."""
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        stored_var = self.variable("batch_stats", "var", jnp.ones, features)
        x = x.astype(jnp.float32)
        mean, var = stored_mean.value, stored_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = self._over_devices(jnp.mean(x, axes))
            var = self._over_devices(jnp.mean(jnp.square(x - mean), axes))
            count = x.size // x.shape[-1]
            if self.axis_name is not None:
                count *= jax.lax.axis_size(self.axis_name)
            unbiased = var * (count / max(count - 1, 1))
            stored_mean.value = self._blend(stored_mean.value, mean)
            stored_var.value = self._blend(stored_var.value, unbiased)
        return ((x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias).astype(self.dtype)

    def _over_devices(self, statistic: jax.Array) -> jax.Array:
        if self.axis_name is None:
            return statistic
        return jax.lax.pmean(statistic, self.axis_name)

    def _blend(self, stored: jax.Array, batch: jax.Array) -> jax.Array:
        return self.momentum * stored + (1 - self.momentum) * jax.lax.stop_gradient(batch)
