"""How much arithmetic a training step is: counted from the shapes of layers, not by a compiler.

XLA counts a loop's body once, and a call to another library not at all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import ktg_jax as ktg


class Layer(NamedTuple):
    """A convolution or a dense layer.

    Attributes:
        kernel: its kernel's shape, the output's channels last.
        output: the shape of its result for one image.
    """

    kernel: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def multiply_adds(self) -> int:
        """Those of the forward pass for one image; taps in the padding count as the others."""
        return math.prod(self.output) * math.prod(self.kernel[:-1])


def layers(model: str, image_shape: tuple[int, int, int], num_classes: int) -> list[Layer]:
    """A model's convolutions and dense layers, in the order in which it calls them.

    Args:
        model: name of a flax.linen model; a layer is a submodule with a parameter `kernel`.
        image_shape: height, width and channels.
        num_classes: number of logits.
    """
    fns = ktg.build_model(model, num_classes)
    found: list[Layer] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            kernel = context.module.get_variable("params", "kernel")
            found.append(Layer(tuple(kernel.shape), tuple(result.shape[1:])))
        return result

    def run(images: jax.Array) -> jax.Array:
        params, model_state = fns.init(jax.random.key(0), images)
        with nn.intercept_methods(note):
            return fns.apply(params, model_state, images, False)[0]

    jax.eval_shape(run, jnp.zeros((1, *image_shape)))
    return found


def train_step_flops(
    model: str, batch_size: int, image_shape: tuple[int, int, int], num_classes: int
) -> int:
    """FLOPs of a node's forward and backward pass, in convolutions and dense layers alone.

    A multiply-add is two. The backward pass is twice the forward one, gradients of inputs and of
    weights, but nobody needs the gradient of the images.
    """
    found = layers(model, image_shape, num_classes)
    forward = sum(layer.multiply_adds for layer in found)
    return 2 * batch_size * (3 * forward - found[0].multiply_adds)
