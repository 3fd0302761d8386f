"""Models that cannot be trained as they are; importing this module registers them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import ktg_jax as ktg


class Linear(nn.Module):
    """What the others are made of."""

    num_classes: int

    def logits(self, images: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, name="classifier")(images.reshape(len(images), -1))

    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return self.logits(images)


class Pair(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return self.logits(images), images


class Named(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return {"logits": self.logits(images)}


class Map(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return nn.Conv(self.num_classes, (3, 3))(images)


class Integers(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return self.logits(images).astype(int)


class Transposed(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return self.logits(images).T


class Nothing(Linear):
    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        self.logits(images)


class Large(Linear):
    """For images of 32x32 alone."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        return self.logits(images.reshape(len(images), 32 * 32))


class Unnamed(Linear):
    """Its mode has an unknown name."""

    @nn.compact
    def __call__(self, images: jax.Array, phase: bool = False) -> Any:
        return self.logits(nn.BatchNorm(use_running_average=not phase)(images))


class LinearNNX(nnx.Module):
    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.classifier = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classifier(images.reshape(len(images), -1))


def fns(init: Any, apply: Any) -> Any:
    """A factory of node functions."""
    return lambda num_classes: ktg.NodeFns(
        init=lambda rng, images: init,
        apply=lambda params, state, images, train: apply(
            jnp.zeros((len(images), num_classes)) + params["bias"], state
        ),
    )


def raising(num_classes: int) -> nn.Module:
    raise OSError("no licence\nfor this model")


BIAS: dict[str, Any] = {"bias": 0.5}
FACTORIES: dict[str, Any] = {
    "pair": Pair,
    "named": Named,
    "map": Map,
    "integers": Integers,
    "transposed": Transposed,
    "seven": lambda num_classes: Linear(7),
    "nothing": Nothing,
    "large": Large,
    "unnamed": Unnamed,
    "raising": raising,
    "none": lambda num_classes: None,
    "class": lambda num_classes: Linear,
    "finished-nnx": lambda num_classes: LinearNNX(num_classes, rngs=nnx.Rngs(0)),
    "text-params": fns(({"bias": "zero"}, {}), lambda logits, state: (logits, state)),
    "int-params": fns(({"bias": jnp.arange(1)}, {}), lambda logits, state: (logits, state)),
    "params-alone": fns(BIAS, lambda logits, state: (logits, state)),
    "stateless": fns((BIAS, {}), lambda logits, state: logits),
    "growing": fns((BIAS, {"n": 0}), lambda logits, state: (logits, {**state, "more": 1})),
    "other-dtype": fns((BIAS, {"n": 0}), lambda logits, state: (logits, {"n": state["n"] + 0.5})),
    "numbers": fns((BIAS, {"n": 0}), lambda logits, state: (logits, {"n": state["n"] + 1})),
}

for name, factory in FACTORIES.items():
    ktg.register_model(name, factory)
ktg.register_model("said", Unnamed, mode="phase")
