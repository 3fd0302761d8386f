"""What a network must offer to be a node, and adapters from flax.linen and flax.nnx."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from ktg_jax.errors import InputError

if TYPE_CHECKING:
    from flax import nnx

PyTree = Any
StageOutputs: TypeAlias = tuple[jax.Array, tuple[jax.Array, ...]]
"""Logits, float `[B, classes]`, and the output of each stage in their order, `[B, h, w, C]`."""


@dataclass(frozen=True)
class NodeFns:
    """A network as two pure functions: any model that can be written so is a node.

    Attributes:
        init: `init(rng, images) -> (params, model_state)`; images float32 `[B, H, W, C]`, of which
            only the shape matters. `params` is what the optimiser updates, `model_state` what the
            forward pass updates (batch statistics, say); both are pytrees of arrays.
        apply: `apply(params, model_state, images, train) -> (logits, model_state)`; logits float
            `[B, classes]`. With `train=False` the model state comes back unchanged.
        stages: as `apply`, with the output of each stage beside the logits: `stages(params,
            model_state, images, train) -> ((logits, stage outputs), model_state)`; or None: a
            network that does not say what its stages are.

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
    stages: Callable[[PyTree, PyTree, jax.Array, bool], tuple[StageOutputs, PyTree]] | None = None


def stage_number(path: Sequence[str]) -> int | None:
    """The stage that a submodule belongs to, by the first of its names that is `stage<g>_...`.

    >>> stage_number(("backbone", "stage2_block1", "conv2")), stage_number(("stem_conv",))
    (2, None)
    """
    for name in path:
        if match := re.match(r"stage(\d+)(?:_|$)", name):
            return int(match[1])
    return None


def from_linen(module: nn.Module) -> NodeFns:
    """A node from a flax.linen module: `module(images)` or `module(images, train=...)` -> logits.

    All collections other than `params` are the model state. There is no random stream for a linen
    module's dropout; `from_nnx` has one.

    Submodules named `stage<g>` or `stage<g>_...` make up stage g. Its output is that of the one
    among them that is called last (of each, the last call).

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

    def is_stage(submodule: nn.Module, method: str) -> bool:
        *outer, name = submodule.path or ("",)
        inside = stage_number(outer) is not None
        return method == "__call__" and stage_number([name]) is not None and not inside

    def stages(
        params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[StageOutputs, PyTree]:
        logits, mutated = module.apply(
            {"params": params, **model_state},
            images,
            **mode(train),
            capture_intermediates=is_stage,
            mutable=["intermediates", *(model_state if train else ())],
        )
        captured = dict(mutated)
        outputs: dict[int, jax.Array] = {}  # in the order of the calls: a stage's last one stays
        for path, calls in flatten_dict(captured.pop("intermediates", {})).items():
            stage = stage_number(path)
            if stage is not None and path[-1] == "__call__":
                outputs[stage] = calls[-1]
        if not outputs:
            allowed = "a module with submodules stage1_..., stage2_..."
            raise InputError("stages", type(module).__name__, allowed)
        in_order = tuple(outputs[stage] for stage in sorted(outputs))
        return (logits, in_order), captured if train else model_state

    return NodeFns(init, apply, stages)


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
