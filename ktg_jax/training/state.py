"""The state of a whole graph: one pytree of all nodes."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ktg_jax.connectors import init_connector, with_connectors
from ktg_jax.errors import InputError
from ktg_jax.graph.derived import Derived
from ktg_jax.graph.graph import Graph
from ktg_jax.models.network import NO_NETWORK, NodeFns, PyTree
from ktg_jax.models.pixels import has_floats, has_tokens
from ktg_jax.models.returned import arrays, errors_of
from ktg_jax.outputs import Outputs
from ktg_jax.training.updates import Optimizers, init_opt_state, optimizers_of


@flax.struct.dataclass
class GraphState:
    """All nodes' parameters and what goes with them, in the order of the graph's nodes.

    Attributes:
        params: N pytrees, what optimisers update.
        model_state: N pytrees, what forward passes update (batch statistics).
        opt_state: N optimiser states; a frozen node has None, and no other node has: where an
            optimiser's own state is None, `init_state` puts `NoOptState()` in its place.
        step: int32 scalar, the number of updates made. With the seed it is the position in the
            data, too.
        stale: what stale senders said for the batches to come, as `with_delays` makes room for it;
            nothing, in a graph without delays.

    >>> GraphState(({},), ({},), (None,), jnp.zeros((), jnp.int32)).frozen
    (0,)
    """

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[Any, ...]
    step: jax.Array
    stale: tuple[Any, ...] = ()

    @property
    def frozen(self) -> tuple[int, ...]:
        """Indices of the nodes that run forward only: those without an optimiser state."""
        return tuple(i for i, opt_state in enumerate(self.opt_state) if opt_state is None)


def init_state(
    graph: Graph,
    node_fns: Sequence[NodeFns],
    optimizer: Optimizers,
    rng: jax.Array,
    sample_images: jax.Array,
) -> GraphState:
    """Initialises every node.

    A node's parameters depend on its name, its model and `rng`: not on the other nodes. An average
    begins as what it averages.

    Args:
        graph: whose `frozen` nodes get no optimiser state.
        node_fns: one a node, in the graph's order.
        optimizer: an optax transformation, applied to each node apart, or one a node.
        rng: a random key.
        sample_images: `[B, H, W, C]`, of which only the shape matters: integers count as floats; or
            tokens, int `[B, T]`.

    Raises:
        InputError: the number of node functions is not the number of nodes, or a network whose
            `init` does not return a pair of pytrees of arrays.

    >>> import ktg_jax as ktg
    >>> graph = ktg.graphs.distillation("cnn", "cnn")
    >>> node_fns = [ktg.build_model(node.model, 10) for node in graph.nodes]
    >>> images = jnp.zeros((1, 8, 8, 1))
    >>> init_state(graph, node_fns, ktg.sgd(), jax.random.key(0), images).frozen
    (1,)
    """
    if len(node_fns) != len(graph.nodes):
        raise InputError("node_fns", len(node_fns), f"{len(graph.nodes)} functions, one a node")
    if not has_floats(sample_images) and not has_tokens(sample_images):
        sample_images = jnp.zeros(jnp.shape(sample_images), jnp.float32)
    variables = []
    for node, fns in zip(graph.nodes, node_fns, strict=True):
        with errors_of(f"node {node.name}"):
            variables.append(arrays(fns.init(node_rng(rng, str(node.name)), sample_images)))
    given, model_state = zip(*variables, strict=True)
    params = _with_connectors(graph, node_fns, given, model_state, rng, sample_images)
    optimizers = optimizers_of(optimizer, len(params))
    opt_state = tuple(
        None if i in graph.frozen else init_opt_state(optimizers[i], node_params)
        for i, node_params in enumerate(params)
    )
    state = GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
    return with_averages(state, graph.derived)


def _with_connectors(
    graph: Graph,
    node_fns: Sequence[NodeFns],
    params: tuple[PyTree, ...],
    model_state: tuple[PyTree, ...],
    rng: jax.Array,
    images: jax.Array,
) -> tuple[PyTree, ...]:
    """The params of all nodes with their connectors, whose shapes are those of the outputs."""
    if not graph.connectors:
        return params

    @functools.cache
    def outputs(i: int) -> Outputs:
        fns = node_fns[i]
        with errors_of(f"node {graph.nodes[i].name}"):
            if fns == NO_NETWORK:
                raise InputError("connector", i, "a network at both ends")
            forward = fns.apply if fns.stages is None else fns.stages
            given, _ = jax.eval_shape(
                lambda params, state, images: forward(params, state, images, False),
                params[i],
                model_state[i],
                images,
            )
        return Outputs(given) if fns.stages is None else Outputs(*given[:2])

    found: dict[int, dict[str, PyTree]] = {}
    for each in graph.connectors:
        names = [str(graph.nodes[i].name) for i in (each.receiver, each.sender)]
        ends = outputs(each.receiver), outputs(each.sender)
        key = node_rng(rng, f"{names[0]}<-{names[1]}")
        with errors_of(f"node {names[1]} as seen by node {names[0]}"):
            connector = init_connector(each.kinds, key, *ends)
        found.setdefault(each.receiver, {})[each.name] = connector
    return tuple(
        with_connectors(each, found[i]) if i in found else each for i, each in enumerate(params)
    )


def with_averages(state: GraphState, derived: Derived) -> GraphState:
    """The state in which each average begins as the node that it averages is."""
    params, model_state = list(state.params), list(state.model_state)
    for average in derived.averages:
        params[average.node] = jax.tree.map(jnp.copy, params[average.source])
        model_state[average.node] = jax.tree.map(jnp.copy, model_state[average.source])
    return dataclasses.replace(state, params=tuple(params), model_state=tuple(model_state))


def node_rng(rng: jax.Array, name: str) -> jax.Array:
    """The random key of the node of that name."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))
