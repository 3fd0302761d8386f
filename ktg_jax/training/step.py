"""The training step of a graph, and the three pure pieces that it is made of.

`node_forward` (a node), `graph_gradients` (the whole graph, on what the nodes put out) and
`node_update` (a node) are all there is to a step. `train_step` composes them in one program; since
nodes meet only in what they put out, they can as well be compiled apart or placed on devices of
their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.connectors import with_connectors, without_connectors
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.errors import InputError
from ktg_jax.graph.derived import PLAIN, Derived
from ktg_jax.mixed import Mixed
from ktg_jax.models.network import NO_NETWORK, NodeFns
from ktg_jax.models.returned import check_for_labels, check_logits, errors_of
from ktg_jax.models.streams import batch_spread_over
from ktg_jax.outputs import Outputs
from ktg_jax.training.accumulate import (
    added,
    check_parts,
    part_of_batch,
    weights_of_parts,
    zeros_of,
)
from ktg_jax.training.delays import check_delays, heard_with, of_nodes, opened, said_ahead, stale_of
from ktg_jax.training.derived import moved, with_ensembles
from ktg_jax.training.forward import graph_forward
from ktg_jax.training.gradients import Metrics, graph_gradients
from ktg_jax.training.node_terms import Priors, checked_priors, distance_metrics
from ktg_jax.training.state import GraphState
from ktg_jax.training.updates import Optimizers, averaged, check_states, node_update, optimizers_of


@dataclass(frozen=True)
class StepOptions:
    """The keyword arguments of `train_step` and of `per_node_step`.

    Attributes:
        node_fns: one a node.
        optimizer: as given to `init_state`: one for all, or one a node. One that asks for `value`
            is given the node's own loss, that of its edges in the whole batch.
        temperature: as for `edge_losses`; `Graph.edge_arrays` has its own.
        priors: one a node, or None where it has none, as `with_priors` returns them; they add to
            the gradients of their own nodes, and to nothing else. None: no node has one.
        where: bool of the labels' shape, which samples count; None: all. Batch statistics see all.
        recorded: the logits of nodes by their index, float `[B, C]`, of which no forward pass is
            made: they are frozen. A node whose functions are `NO_NETWORK` must be among them, or an
            ensemble.
        derived: `Graph.derived`, which nodes are ensembles or averages of others.
        mixed: what is mixed into each sample, as for `edge_losses`.
        accumulate: in how many equal parts the batch is computed, one after another, to save
            memory; the update is by the mean of their gradients. Each part has batch statistics of
            its own, and losses that compare samples see a part at a time.
        remat: whether what networks put out on the way is computed once more in the backward pass
            and not kept: of the built-in ones all within a block, of others all.
    """

    node_fns: Sequence[NodeFns]
    optimizer: Optimizers
    temperature: ArrayLike = 1.0
    priors: Priors | None = None
    where: ArrayLike | None = None
    recorded: Mapping[int, ArrayLike] | None = None
    derived: Derived = PLAIN
    mixed: Mixed | None = None
    accumulate: int = 1
    remat: bool = False

    @property
    def optimizers(self) -> tuple[optax.GradientTransformation, ...]:
        """One a node."""
        return optimizers_of(self.optimizer, len(self.node_fns))

    @property
    def ensembles(self) -> tuple[int, ...]:
        """Indices of the nodes that are ensembles."""
        return tuple(each.node for each in self.derived.ensembles)


def train_step(
    state: GraphState,
    images: jax.Array,
    labels: ArrayLike,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    *,
    axis_name: str | None = None,
    batched: bool = False,
    ahead: Mapping[int, jax.Array] | None = None,
    **options: Any,
) -> tuple[GraphState, Metrics]:
    """One update of every node at once, from one forward and one backward pass. Pure.

    The models (`node_fns`) and the set of frozen nodes (the structure of `state`) are static; the
    gates are data, so one compiled program serves every graph over the same models.

    Args:
        state: from `init_state`.
        images: float `[B, H, W, C]`, as for `node_forward`.
        labels: int `[B]`, or of the logits' shape without classes, as tokens have them.
        gates: `Graph.edge_arrays`, or as for `edge_losses`: codes or coefficients. They gate
            losses; what freezes a node is the state alone.
        progress: scalar in (0, 1]; the k-th update of k_end has k / k_end.
        axis_name: the mapped axis over which the batch is spread under `jax.pmap`; the update is
            then that of the whole batch, of which each device's share has random numbers of its
            own.
        batched: whether learning nodes of equal functions make one forward and one backward pass
            together, by `jax.vmap` over their parameters: fewer and larger operations, and the same
            update to the rounding of the device's convolutions.
        ahead: where senders are stale, the images of the batches so many updates ahead, by these
            numbers, each as `images`; the state has room for them (`with_delays`).
        **options: the fields of `StepOptions`: `node_fns`, `optimizer` and others.

    Returns:
        The new state and the metrics of `graph_gradients`. With priors also `prior_distance`,
        float32 `[N, G]`: how far each kernel of each node was from its prior's before the update;
        NaN where there is none (-1 under `jax_debug_nans`). Nothing of a frozen node changes, but
        for the weights of an average.

    Raises:
        InputError: images that are no floats; a prior of a frozen node or of another student, or
            not one entry a node; stages that are needed and not there, or do not fit each other; a
            network whose logits are not float `[B, classes]`, the same for all; a batch that cannot
            be cut into so many parts; a state without room for stale senders, or no images for
            them; an optimiser that asks for more than `value`, or whose state is None where the
            state, made by hand, has None for every node; recorded logits that are missing, or of a
            node that learns.

    >>> from functools import partial
    >>> import ktg_jax as ktg
    >>> graph, optimizer = ktg.graphs.mutual(["cnn", "cnn"]), ktg.sgd(learning_rate=0.1)
    >>> node_fns = [ktg.build_model(node.model, num_classes=10) for node in graph.nodes]
    >>> images, labels = jnp.ones((4, 8, 8, 1)), jnp.arange(4)
    >>> state = ktg.init_state(graph, node_fns, optimizer, jax.random.key(0), images)
    >>> step = jax.jit(partial(train_step, node_fns=node_fns, optimizer=optimizer))
    >>> state, metrics = step(state, images, labels, graph.gate_codes, progress=0.1)
    >>> int(state.step), metrics["edge_losses"].shape
    (1, (2, 2))
    """
    how = StepOptions(**options)
    optimizers = how.optimizers
    check_states(state.opt_state, state.params, optimizers)
    priors, edges = checked_priors(how.priors, state), edge_arrays(gates, how.temperature)
    recorded = checked_recorded(how, state, labels, edges.needs_stages)
    check_delays(state, edges, ahead)
    stale = stale_of(state, edges, axis_name)
    batch = Batch(images, labels, recorded, how.where, how.mixed, stale)
    open_edges = opened(edges, state.step)
    with batch_spread_over(axis_name):
        at_once = functools.partial(
            _gradients,
            edges=open_edges,
            progress=progress,
            how=how,
            axis_name=axis_name,
            batched=batched,
        )
        in_parts = functools.partial(_gradients_in_parts, at_once, how.accumulate, axis_name)
        made = (at_once if how.accumulate == 1 else in_parts)(state, batch)
        said = said_ahead(state, edges, ahead, how.node_fns, axis_name)
    model_state, metrics = list(made.model_state), made.metrics
    if axis_name is not None:
        metrics = jax.lax.pmean(metrics, axis_name)
        model_state = [averaged(each, axis_name) for each in model_state]
    params, opt_state = list(state.params), list(state.opt_state)
    distances: list[jax.Array | None] = [None] * len(priors)
    for i, (gradients, prior) in enumerate(zip(made.gradients, priors, strict=True)):
        if gradients is None:
            continue
        with jax.named_scope(f"node{i}_update"):
            if axis_name is not None:
                gradients = jax.lax.pmean(gradients, axis_name)
            if prior is not None:
                gradients, distances[i] = prior.add_to(gradients, params[i], progress)
            updated = params[i], opt_state[i], gradients
            own_loss = metrics["loss"][i]
            params[i], opt_state[i] = node_update(*updated, optimizer=optimizers[i], value=own_loss)
    for average in how.derived.averages:
        i, source = average.node, average.source
        params[i] = moved(params[i], params[source], average.decay)
        model_state[i] = moved(model_state[i], model_state[source], average.decay)
    metrics |= distance_metrics(distances)
    new = tuple(params), tuple(model_state), tuple(opt_state), state.step + 1, said
    return GraphState(*new), metrics


class Batch(NamedTuple):
    """A batch, or a part of it: arguments of `train_step`, and what stale senders said for it."""

    images: Any
    labels: Any
    recorded: dict[int, Any]
    where: ArrayLike | None
    mixed: Mixed | None
    stale: tuple[Any, ...]


class _Gradients(NamedTuple):
    """Of each node the gradients (None: it does not learn) and the model state; and metrics."""

    gradients: tuple[Any, ...]
    model_state: tuple[Any, ...]
    metrics: Metrics


def _gradients_in_parts(
    at_once: Callable[[GraphState, Batch], _Gradients],
    parts: int,
    axis_name: str | None,
    state: GraphState,
    batch: Batch,
) -> _Gradients:
    """The gradients of a batch in so many equal parts, one after another."""
    check_parts(len(batch.images), parts)
    weights = weights_of_parts(batch.where, parts, axis_name)

    def of_part(model_state: tuple[Any, ...], part: Batch) -> _Gradients:
        return at_once(dataclasses.replace(state, model_state=model_state), part)

    def add_part(so_far: _Gradients, index: jax.Array) -> tuple[_Gradients, None]:
        made = of_part(so_far.model_state, part_of_batch(batch, parts, index))
        sums = so_far.gradients, so_far.metrics
        sums = added(sums, (made.gradients, made.metrics), weights[index])
        return _Gradients(sums[0], made.model_state, sums[1]), None

    shapes = jax.eval_shape(of_part, state.model_state, part_of_batch(batch, parts, 0))
    none_yet = zeros_of(shapes)._replace(model_state=state.model_state)
    return jax.lax.scan(add_part, none_yet, jnp.arange(parts))[0]


def _gradients(
    state: GraphState,
    batch: Batch,
    *,
    edges: EdgeArrays,
    progress: ArrayLike,
    how: StepOptions,
    axis_name: str | None,
    batched: bool,
) -> _Gradients:
    """The gradients of a batch by one forward and one backward pass of every node."""
    made = graph_forward(
        state,
        batch.images,
        batch.labels,
        how.node_fns,
        given=dict.fromkeys(how.ensembles) | batch.recorded,
        with_stages=edges.needs_stages,
        batched=batched,
        remat=how.remat,
    )
    outputs = heard_with(with_ensembles(made.outputs, how.derived.ensembles), batch.stale, edges)
    connectors = [without_connectors(each)[1] for each in state.params]
    (output_gradients, connector_gradients), metrics = graph_gradients(
        tuple(outputs),
        batch.labels,
        edges,
        progress,
        where=batch.where,
        axis_name=axis_name,
        connectors=connectors,
        mixed=batch.mixed,
    )
    gradients = [
        with_connectors(each, connector_gradients[i])
        if connectors[i] and each is not None
        else each
        for i, each in enumerate(made.pullback(output_gradients))
    ]
    return _Gradients(tuple(gradients), tuple(made.model_state), of_nodes(metrics, edges))


def checked_recorded(
    how: StepOptions, state: GraphState, labels: ArrayLike, with_stages: bool
) -> dict[int, Any]:
    """What recorded nodes put out, by index, in the form that the others' outputs have.

    Raises:
        InputError: outputs of a node that learns or is not there, missing ones, or ones that are
            not float `[B, C]`.
    """
    recorded: dict[int, Any] = dict(how.recorded or {})
    for i, fns in enumerate(how.node_fns):
        if fns == NO_NETWORK and i not in recorded and i not in how.ensembles:
            raise InputError("recorded", sorted(recorded), f"the logits of node {i}, too")
    for i, given in recorded.items():
        if i not in state.frozen:
            frozen = ", ".join(map(str, state.frozen)) or "none"
            raise InputError("recorded", i, f"frozen nodes alone: {frozen}")
        logits = jnp.asarray(given.logits if isinstance(given, Outputs) else given)
        with errors_of(f"node {i}"):
            check_logits(logits, len(jnp.asarray(labels)))
            check_for_labels(logits, labels)
        if not isinstance(given, Outputs):
            recorded[i] = Outputs(logits) if with_stages else logits
    return recorded
