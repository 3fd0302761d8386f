"""What a network must offer to be a node."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from ktg_jax.errors import InputError
from ktg_jax.outputs import Outputs

PyTree = Any
BLOCK = "block"
"""What networks name the outputs of their blocks, with `jax.ad_checkpoint.checkpoint_name`: all
that is kept for the backward pass where the rest is computed once more."""

StagedOutputs: TypeAlias = Outputs | tuple[jax.Array, tuple[jax.Array, ...]]
"""Logits, and the output of each stage; a plain pair serves as well."""

FedStages: TypeAlias = Callable[
    [PyTree, PyTree, jax.Array, Sequence[jax.Array | None], bool], tuple[Outputs, PyTree]
]
"""See `NodeFns.fed_stages`."""


@dataclass(frozen=True)
class NodeFns:
    """A network as two pure functions: any model that can be written so is a node.

    Attributes:
        init: `init(rng, images) -> (params, model_state)`; images float32 `[B, H, W, C]`, of which
            only the shape matters. `params` is what the optimiser updates, `model_state` what the
            forward pass updates (batch statistics, or the state of a random stream); both are
            pytrees of arrays.
        apply: `apply(params, model_state, images, train) -> (logits, model_state)`; images
            float32, as the network is to see them (the experiments divide uint8 by 255), logits
            float `[B, classes]`. With `train=False` the model state comes back unchanged.
        stages: as `apply`, with the output of each stage beside the logits: `stages(params,
            model_state, images, train) -> (Outputs, model_state)`; or None: a network that does not
            say what its stages are.
        fed_stages: as `stages`, with stages that are fed from outside: `fed_stages(params,
            model_state, images, inputs, train) -> (Outputs, model_state)`. Of G stages `inputs` has
            G + 1 entries: what goes into the first stage, and what is passed on in place of each
            one's output, float `[B, h, w, C]`; None: what the network makes itself. Without
            entries it makes all itself. The stages of the `Outputs` are what it made at these
            G + 1 places. None: a network that cannot.
        stage_paths: the paths of the submodules that are the stages, in their order, where they are
            named otherwise than `stage<g>` or `stage<g>_...`.

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
    stages: Callable[[PyTree, PyTree, jax.Array, bool], tuple[StagedOutputs, PyTree]] | None = None
    fed_stages: FedStages | None = None
    stage_paths: tuple[str, ...] | None = None


def with_images(fns: NodeFns, change: Callable[[jax.Array], jax.Array]) -> NodeFns:
    """The same network, whose images are changed before it sees them, but for `init`.

    >>> import jax.numpy as jnp
    >>> same = NodeFns(init=lambda rng, images: ({}, {}),
    ...                apply=lambda params, state, images, train: (images, state))
    >>> with_images(same, lambda images: 2 * images).apply({}, {}, jnp.ones(1), False)[0].tolist()
    [2.0]
    """

    def changed(run: Callable[..., Any]) -> Callable[..., Any]:
        def of_images(params: PyTree, model_state: PyTree, images: jax.Array, *more: Any) -> Any:
            return run(params, model_state, change(images), *more)

        return of_images

    functions = {field: getattr(fns, field) for field in ("apply", "stages", "fed_stages")}
    made: dict[str, Any] = {
        field: changed(run) for field, run in functions.items() if run is not None
    }
    return dataclasses.replace(fns, **made)


def _nothing(rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
    return {}, {}


def _no_forward(*inputs: Any) -> Any:
    raise InputError("recorded", None, "the logits of a node that has no network")


NO_NETWORK = NodeFns(_nothing, _no_forward)
"""The functions of a recorded node: it has no parameters, and its outputs are given to the step."""


def stage_number(path: Sequence[str], stages: Sequence[str] | None = None) -> int | None:
    """The stage that a submodule belongs to, by the first of its names that is `stage<g>_...`.

    Args:
        path: the names that lead to it.
        stages: the stages' paths, where they have other names.

    >>> stage_number(("backbone", "stage2_block1", "conv2")), stage_number(("stem_conv",))
    (2, None)
    >>> stage_number(("trunk", "b", "conv"), stages=["trunk.a", "trunk.b"])
    2
    """
    if stages is not None:
        within = [f"{'.'.join(path)}.".startswith(f"{stage}.") for stage in stages]
        return within.index(True) + 1 if any(within) else None
    for name in path:
        if match := re.match(r"stage(\d+)(?:_|$)", name):
            return int(match[1])
    return None


def checked_stages(paths: Any) -> tuple[str, ...] | None:
    """The paths of submodules that are the stages, or None.

    Raises:
        InputError: something else, none, or one that is there twice.

    >>> checked_stages(["encoder.block_0", "encoder.block_1"])
    ('encoder.block_0', 'encoder.block_1')
    """
    if paths is None:
        return None
    is_list = isinstance(paths, Sequence) and not isinstance(paths, str)
    if not is_list or not paths or not all(isinstance(path, str) and path for path in paths):
        raise InputError("stages", paths, "paths of submodules, at least one, or None")
    if len(set(paths)) < len(paths):
        raise InputError("stages", list(paths), "each path once")
    return tuple(paths)


def check_found(name: str, paths: Sequence[str], found: Sequence[str]) -> None:
    """Raises InputError where a module of this name did not call the submodules of all paths."""
    missing = [path for path in paths if path not in found]
    if missing:
        raise InputError("stages", missing[0], f"the path of a submodule that {name} calls")
