"""Forward passes of a graph's nodes in training, and how gradients get back through them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.connectors import without_connectors
from ktg_jax.errors import InputError
from ktg_jax.models.network import BLOCK, NodeFns, PyTree
from ktg_jax.models.pixels import check_floats
from ktg_jax.models.returned import check_for_labels, check_logits, check_pair, errors_of
from ktg_jax.outputs import Outputs
from ktg_jax.training.state import GraphState

_KEPT = jax.checkpoint_policies.save_only_these_names(BLOCK)
"""What a backward pass finds where the rest is computed once more."""


def node_forward(
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
    *,
    fns: NodeFns,
    frozen: bool = False,
    with_stages: bool = False,
    remat: bool = False,
) -> tuple[jax.Array | Outputs, PyTree]:
    """A node's forward pass in training.

    Args:
        params: the node's parameters; its connectors have no part in this.
        model_state: the node's model state.
        images: float `[B, H, W, C]`, as the network is to see them: the experiments divide uint8
            by 255. Or tokens, int `[B, T]`.
        fns: the node's functions.
        frozen: run with the stored statistics and change nothing.
        with_stages: return the stages' outputs, too.
        remat: as in `StepOptions`.

    Returns:
        The logits, float `[B, classes]`, and the new model state. With stages, the node's
        `Outputs` in place of the logits.

    Raises:
        InputError: images that are no floats, stages of a network that does not name them, or a
            network that does not return logits `[B, classes]` of a float dtype.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("cnn", num_classes=10)
    >>> params, model_state = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> logits, model_state = node_forward(params, model_state, jnp.ones((4, 8, 8, 1)), fns=fns)
    >>> logits.shape
    (4, 10)
    """
    check_floats(images)
    params, _ = without_connectors(params)
    if with_stages and fns.stages is None:
        raise InputError("stages", None, "a network that names its stages (NodeFns.stages)")
    forward = fns.stages if with_stages and fns.stages is not None else fns.apply
    if remat and not frozen:
        forward = jax.checkpoint(forward, static_argnums=3, policy=_KEPT)
    made = forward(params, model_state, images, not frozen)
    check_pair(made, "stages" if with_stages else "apply", "what it puts out and the model state")
    output: Any
    output, new_model_state = made
    if with_stages:
        check_pair(output, "stages", "logits and stage outputs")
        output = Outputs(output[0], tuple(output[1]))
    batch_size = len(images) if hasattr(images, "shape") else None
    check_logits(output[0] if with_stages else output, batch_size)
    return output, model_state if frozen else new_model_state


class Forward(NamedTuple):
    """What the forward passes of all nodes made.

    Attributes:
        outputs: N arrays of logits or `Outputs`; what was given, for a node that made none.
        model_state: N new model states.
        pullback: of N gradients with respect to the outputs it makes N gradients with respect to
            the parameters of the networks, without connectors; None for a node that does not learn.
    """

    outputs: list[Any]
    model_state: list[PyTree]
    pullback: Callable[[Sequence[Any]], list[PyTree | None]]


def graph_forward(
    state: GraphState,
    images: jax.Array,
    labels: ArrayLike,
    node_fns: Sequence[NodeFns],
    *,
    given: Mapping[int, Any],
    with_stages: bool,
    batched: bool,
    remat: bool = False,
) -> Forward:
    """The forward passes of all nodes.

    Args:
        state: as for `train_step`; `images` and `labels` as well.
        images: float `[B, H, W, C]`.
        labels: int `[B]`, or one a token.
        node_fns: one a node.
        given: what nodes put out of which no forward pass is made, by their indices.
        with_stages: whether the outputs are `Outputs`.
        batched: whether learning nodes of equal functions make one pass together.
        remat: as in `StepOptions`.

    Raises:
        InputError: as `node_forward`.
    """
    outputs, model_state = [given.get(i) for i in range(len(node_fns))], list(state.model_state)
    learning: dict[int, list[int]] = {}
    for i, fns in enumerate(node_fns):
        if i in given:
            continue
        if i not in state.frozen:
            learning.setdefault(node_fns.index(fns) if batched else i, []).append(i)
            continue
        with jax.named_scope(f"node{i}_forward"), errors_of(f"node {i}"):
            made: Any
            made, _ = node_forward(
                state.params[i],
                state.model_state[i],
                images,
                fns=fns,
                frozen=True,
                with_stages=with_stages,
            )
            check_for_labels(made.logits if with_stages else made, labels)
        outputs[i] = made
    pullbacks = []
    for first, members in learning.items():
        name = "_".join(map(str, members))
        with jax.named_scope(f"node{name}_forward"), errors_of(f"node {first}"):
            passed, pullback, states = _learning(
                [without_connectors(state.params[i])[0] for i in members],
                [state.model_state[i] for i in members],
                images,
                functools.partial(
                    node_forward, fns=node_fns[first], with_stages=with_stages, remat=remat
                ),
            )
            for i, output, new_state in zip(members, passed, states, strict=True):
                check_for_labels(output.logits if with_stages else output, labels)
                outputs[i], model_state[i] = output, new_state
        pullbacks.append((members, pullback))

    def pull_back(output_gradients: Sequence[Any]) -> list[PyTree | None]:
        gradients: list[PyTree | None] = [None] * len(node_fns)
        for members, pullback in pullbacks:
            pulled = pullback([output_gradients[i] for i in members])
            for i, gradient in zip(members, pulled, strict=True):
                gradients[i] = gradient
        return gradients

    return Forward(outputs, model_state, pull_back)


def _learning(
    params: Sequence[PyTree],
    model_state: Sequence[PyTree],
    images: jax.Array,
    forward_of: Callable[..., tuple[Any, PyTree]],
) -> tuple[Sequence[Any], Callable[[Sequence[Any]], Sequence[PyTree]], Sequence[PyTree]]:
    """Of one or more learning nodes of the same network: outputs, their pullback, new states."""

    def forward(params: PyTree, model_state: PyTree) -> tuple[Any, PyTree]:
        return forward_of(params, model_state, images)

    if len(params) == 1:
        output, pull, new_state = jax.vjp(
            lambda p: forward(p, model_state[0]), params[0], has_aux=True
        )
        return [output], lambda gradients: list(pull(gradients[0])), [new_state]
    stacked_state = _stacked(model_state)
    outputs, pull, new_states = jax.vjp(
        lambda p: jax.vmap(forward)(p, stacked_state), _stacked(params), has_aux=True
    )
    number = len(params)

    def pull_all(gradients: Sequence[Any]) -> Sequence[PyTree]:
        return _unstacked(pull(_stacked(gradients))[0], number)

    return _unstacked(outputs, number), pull_all, _unstacked(new_states, number)


def _stacked(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstacked(tree: PyTree, number: int) -> list[PyTree]:
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, [leaf[k] for leaf in leaves]) for k in range(number)]
