"""What a network must offer to be a node, and adapters from flax.linen and flax.nnx."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from ktg_jax.errors import InputError

if TYPE_CHECKING:
    from flax import nnx

PyTree = Any


@dataclass(frozen=True)
class NodeFns:
    """A network as two pure functions: any model that can be written so is a node.

    Attributes:
        init: `init(rng, images) -> (params, model_state)`; images float32 `[B, H, W, C]`, of which
            only the shape matters. `params` is what the optimiser updates, `model_state` what the
            forward pass updates (batch statistics, say); both are pytrees of arrays.
        apply: `apply(params, model_state, images, train) -> (logits, model_state)`; logits float
            `[B, classes]`. With `train=False` the model state comes back unchanged.

    >>> import jax.numpy as jnp
    >>> average = NodeFns(
    ...     init=lambda rng, images: (jnp.ones(10), {}),
    ...     apply=lambda params, state, images, train: (
    ...         images.mean((1, 2, 3))[:, None] * params, state))
    >>> params, state = average.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> average.apply(params, state, jnp.zeros((4, 8, 8, 1)), True)[0].shape
    (4, 10)
    """

    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, jax.Array, bool], tuple[jax.Array, PyTree]]


def from_linen(module: nn.Module) -> NodeFns:
    """A node from a flax.linen module: `module(images)` or `module(images, train=...)` -> logits.

    All collections other than `params` are the model state. There is no random stream for a linen
    module's dropout; `from_nnx` has one.

    >>> fns = from_linen(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)]))
    >>> params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    >>> params["layers_1"]["kernel"].shape
    (64, 10)
    """
    takes_train = "train" in inspect.signature(module.__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train else {}

    def init(rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
        # Lazily: layer by layer, without running the network. Compiled whole, the initialisation
        # of a deep one takes as long as its training step.
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        variables = dict(module.lazy_init(rng, shape, **mode(False)))
        return variables.pop("params", {}), variables

    def apply(
        params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, **model_state}
        mutable = list(model_state) if train else []
        logits, new_model_state = module.apply(variables, images, **mode(train), mutable=mutable)
        return logits, new_model_state if train else model_state

    return NodeFns(init, apply)


def from_nnx(create: "Callable[..., nnx.Module]", *args: Any, **kwargs: Any) -> NodeFns:
    """A node from a flax.nnx module: `create(*args, rngs=rngs, **kwargs)` makes it.

    `create` is the module's class, or a function with an argument `rngs`. The module is called as
    `module(images)`, after `module.train()` or `module.eval()`. Its `nnx.Param` variables are the
    params; all others (batch statistics, random streams) are the model state.

    Raises:
        InputError: `create` is a module, not what makes one: its weights could not depend on the
            node and the seed.

    >>> from flax import nnx
    >>> fns = from_nnx(nnx.Linear, 64, 10)
    >>> params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 64)))
    >>> params["kernel"].shape
    (64, 10)
    """
    from flax import nnx  # a good part of flax's import, for those who use it

    if isinstance(create, nnx.Module):
        raise InputError("create", type(create).__name__, "a module's class or a function of rngs")

    def split(module: "nnx.Module") -> tuple[PyTree, PyTree]:
        # Plain arrays: an nnx.Variable remembers the trace it was made in, and may not leave it.
        params, model_state = nnx.state(module, nnx.Param), nnx.state(module, nnx.Not(nnx.Param))
        return nnx.as_pure(params), nnx.as_pure(model_state)

    def init(rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
        del images  # nnx modules know their shapes when they are made
        module = create(*args, rngs=nnx.Rngs(rng), **kwargs)
        return split(module)

    # The static part does not depend on the random key: found once, without computing weights.
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(*args, rngs=nnx.Rngs(0), **kwargs)))

    def apply(
        params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        module = nnx.merge(graphdef, params, model_state)
        if not train:
            module.eval()
            return module(images), model_state
        module.train()
        logits = module(images)
        return logits, split(module)[1]

    return NodeFns(init, apply)
