"""Stale senders: edges whose receiver hears what the sender would have said some updates ago.

An edge with a delay of K carries what its sender, as it was K updates ago and with the statistics
that it had stored then, puts out for the receiver's batch of today: codistillation (Anil et al.,
2018), where networks that train apart exchange what they put out. Which images a batch holds is
known ahead, so the sender puts out today what will be heard K updates on, and the state keeps it
till then. In the first K updates there is nothing to be heard: the edge is as good as cut.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.edge_arrays import Delayed, EdgeArrays
from ktg_jax.errors import InputError
from ktg_jax.gates import CUTOFF
from ktg_jax.models.network import NodeFns
from ktg_jax.outputs import Outputs
from ktg_jax.training.forward import node_forward
from ktg_jax.training.state import GraphState


def with_delays(
    state: GraphState, edges: EdgeArrays, node_fns: Sequence[NodeFns], images: Any
) -> GraphState:
    """A new state that has room for what its stale senders put out.

    Args:
        state: from `init_state`.
        edges: `Graph.edge_arrays`.
        node_fns: one a node.
        images: of a whole batch, of which only shape and dtype matter: float `[B, H, W, C]`.

    Returns:
        The state with `stale`: for each of `edges.delayed` the outputs of the last K updates, zeros
        `[K, B, ...]`; None for a sender that never changes, which needs none.

    >>> import ktg_jax as ktg
    >>> graph = ktg.Graph(["cnn", "cnn"], [["through", ktg.Edge(delay=3)], ["cutoff", "through"]])
    >>> fns = [ktg.build_model("cnn", 10)] * 2
    >>> images = jnp.zeros((4, 8, 8, 1))
    >>> state = ktg.init_state(graph, fns, ktg.sgd(), jax.random.key(0), images)
    >>> with_delays(state, graph.edge_arrays, fns, images).stale[0].shape
    (3, 4, 10)
    """

    def room(delayed: Delayed) -> Any:
        i = delayed.sender
        if not delayed.changes:
            return None
        shapes = jax.eval_shape(
            lambda params, model_state, images: _ahead(
                params, model_state, images, node_fns[i], edges.needs_stages
            ),
            state.params[i],
            state.model_state[i],
            images,
        )
        return jax.tree.map(lambda x: jnp.zeros((delayed.delay, *x.shape), x.dtype), shapes)

    return dataclasses.replace(state, stale=tuple(room(each) for each in edges.delayed))


def check_delays(state: GraphState, edges: EdgeArrays, ahead: Mapping[int, Any] | None) -> None:
    """Raises InputError unless the state has room, and images of the batches ahead are given."""
    if len(state.stale) != len(edges.delayed):
        allowed = f"room for {len(edges.delayed)} stale senders, as ktg.with_delays makes it"
        raise InputError("stale", len(state.stale), allowed)
    wanted = delays_of(edges)
    if not wanted <= set(ahead or {}):
        allowed = f"the images of the batches so many updates ahead: {sorted(wanted)}"
        raise InputError("ahead", sorted(ahead or {}), allowed)


def delays_of(edges: EdgeArrays) -> set[int]:
    """How many updates ahead images are needed."""
    return {each.delay for each in edges.delayed if each.changes}


def stale_of(state: GraphState, edges: EdgeArrays, axis_name: str | None = None) -> tuple[Any, ...]:
    """What stale senders said for the batch of an update; None for those that never change."""
    both = zip(edges.delayed, state.stale, strict=True)
    return tuple(
        None if ring is None else heard(ring, state.step, each.delay, axis_name)
        for each, ring in both
    )


def heard_with(outputs: Sequence[Any], stale: Sequence[Any], edges: EdgeArrays) -> list[Any]:
    """What all nodes put out, and after these what stale senders said."""
    both = zip(edges.delayed, stale, strict=True)
    return [*outputs, *(outputs[each.sender] if said is None else said for each, said in both)]


def heard(ring: Any, step: jax.Array, delay: int, axis_name: str | None = None) -> Any:
    """What is heard in an update: of a mapped axis this device's share."""

    def of_today(x: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(x, step % delay, keepdims=False)
        if axis_name is None:
            return x
        size = len(x) // jax.lax.axis_size(axis_name)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * size, size)

    return jax.tree.map(of_today, ring)


def pushed(ring: Any, made: Any, step: jax.Array, axis_name: str | None = None) -> Any:
    """The outputs of the last K updates, the oldest ones replaced by what was made in this one."""

    def push(kept: jax.Array, new: jax.Array) -> jax.Array:
        if axis_name is not None:
            new = jax.lax.all_gather(new, axis_name, tiled=True)
        return jax.lax.dynamic_update_index_in_dim(kept, new, step % len(kept), 0)

    return jax.tree.map(push, ring, made)


def said_ahead(
    state: GraphState,
    edges: EdgeArrays,
    ahead: Mapping[int, jax.Array] | None,
    node_fns: Sequence[NodeFns],
    axis_name: str | None = None,
) -> tuple[Any, ...]:
    """The state's `stale` after an update: what stale senders put out for the batches ahead."""
    after = []
    for (i, delay, _), ring in zip(edges.delayed, state.stale, strict=True):
        if ring is not None:
            assert ahead is not None  # or check_delays would have raised
            given = state.params[i], state.model_state[i], ahead[delay]
            made = _ahead(*given, node_fns[i], edges.needs_stages)
            ring = pushed(ring, made, state.step, axis_name)
        after.append(ring)
    return tuple(after)


def _ahead(
    params: Any, model_state: Any, images: jax.Array, fns: NodeFns, with_stages: bool
) -> jax.Array | Outputs:
    how: dict[str, Any] = {"fns": fns, "frozen": True, "with_stages": with_stages}
    return jax.lax.stop_gradient(node_forward(params, model_state, images, **how)[0])


def opened(edges: EdgeArrays, step: jax.Array) -> EdgeArrays:
    """The edges, those cut whose stale sender has said nothing yet."""
    if not edges.delayed:
        return edges
    gates = jnp.asarray(edges.gates)
    fresh = gates.shape[0] - len(edges.delayed)
    delays = jnp.array([0] * fresh + [each.delay for each in edges.delayed])
    is_silent = (step < delays)[None, :]
    if gates.ndim == 3:
        return dataclasses.replace(edges, gates=jnp.where(is_silent[..., None], 0, gates))
    return dataclasses.replace(edges, gates=jnp.where(is_silent, CUTOFF, gates))


def of_nodes(metrics: Mapping[str, jax.Array], edges: EdgeArrays) -> dict[str, jax.Array]:
    """The metrics of the nodes alone: what stale senders say counts as what their nodes do."""
    number = len(edges.delayed)
    if not number:
        return dict(metrics)
    nodes = metrics["loss"].shape[0] - number
    losses = metrics["edge_losses"][:nodes]
    folded = losses[:, :nodes]
    for column, delayed in enumerate(edges.delayed, start=nodes):
        folded = folded.at[:, delayed.sender].add(losses[:, column])
    return {
        "loss": metrics["loss"][:nodes],
        "accuracy": metrics["accuracy"][:nodes],
        "edge_losses": folded,
    }
