"""Networks of flax.nnx that name their stages in their own way."""

import itertools

import jax
from flax import nnx


class Block(nnx.Module):
    """A convolution with batch statistics."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Net(nnx.Module):
    """A list of blocks, a dropout and a head."""

    def __init__(
        self, num_classes: int, widths: tuple[int, ...] = (1, 4, 6), *, rngs: nnx.Rngs
    ) -> None:
        pairs = itertools.pairwise(widths)
        self.blocks = nnx.List([Block(a, b, rngs=rngs) for a, b in pairs])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        for block in self.blocks:
            images = block(images)
        return self.head(self.dropout(images.mean((1, 2))))
