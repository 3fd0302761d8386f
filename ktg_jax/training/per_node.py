"""The training step node by node: one executable for each model instead of one for each graph.

Nodes meet only in what they put out: logits, and stage outputs where edges compare them. So a
node's forward pass (with its pullback), the losses of the graph, and a node's update are compiled
apart, once for each distinct model (`ktg_jax.training.programs`): any graph over models that are
already compiled, with any gates and any frozen nodes, starts at once. Every node lives in one
place, a device or a group of them, and only what nodes put out travels between places.
`train_step` is the reference: both give the same update to float rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from ktg_jax.connectors import without_connectors
from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.models.network import PyTree
from ktg_jax.models.returned import check_for_labels, errors_of
from ktg_jax.training import programs
from ktg_jax.training.accumulate import (
    check_parts,
    weights_of_parts,
)
from ktg_jax.training.delays import check_delays, heard_with
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import checked_priors
from ktg_jax.training.placement import Place, Placement, split, whole
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import Batch, StepOptions, checked_recorded
from ktg_jax.training.updates import check_states


def per_node_step(
    state: GraphState,
    images: Mapping[Place, jax.Array],
    labels: jax.Array,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    *,
    placement: Placement,
    ahead: Mapping[int, Mapping[Place, jax.Array]] | None = None,
    meet: Callable[[list[Any]], list[Any]] | None = None,
    **options: Any,
) -> tuple[GraphState, Metrics]:
    """One update of every node, like `train_step`; composes compiled pieces and is not jitted.

    Args:
        state: as `place` returns it; its optimiser states are consumed.
        images: float `[B, H, W, C]`, as for `node_forward`, in each place that has nodes, and split
            over its devices.
        labels: int `[B]`, in the first node's place, likewise.
        gates: as for `train_step`.
        progress: scalar in (0, 1].
        placement: the place of each node.
        ahead: as for `train_step`, the images of each batch in each place that has stale senders.
        meet: given what all nodes put out, in the first node's place, it fills in what it knows
            better: of nodes that other processes compute, here given as recorded.
        **options: the fields of `StepOptions`. Equal `node_fns` share their executables; `priors`
            are best already in their nodes' places; `where`, `recorded` and `mixed` are to be in
            the first node's.

    Returns:
        The new state, and the metrics of `train_step` in the first node's place.

    Raises:
        InputError: as `train_step`.

    >>> import jax.numpy as jnp
    >>> import ktg_jax as ktg
    >>> graph, optimizer = ktg.graphs.mutual(["cnn", "cnn"]), ktg.sgd(learning_rate=0.1)
    >>> node_fns = [ktg.build_model(node.model, num_classes=10) for node in graph.nodes]
    >>> images, labels = jnp.ones((4, 8, 8, 1)), jnp.arange(4)
    >>> from ktg_jax.training.placement import balanced, place
    >>> device = jax.local_devices()[0]
    >>> placement = balanced([1.0, 1.0], [device])
    >>> state = ktg.init_state(graph, node_fns, optimizer, jax.random.key(0), images)
    >>> state, metrics = per_node_step(
    ...     place(state, placement), {device: images}, labels, graph.gate_codes, 0.1,
    ...     node_fns=node_fns, optimizer=optimizer, placement=placement)
    >>> int(state.step)
    1
    """
    how = StepOptions(**options)
    optimizers = how.optimizers
    priors = checked_priors(how.priors, state)
    check_states(state.opt_state, state.params, optimizers)
    edges = edge_arrays(gates, how.temperature)
    recorded = checked_recorded(how, state, labels, edges.needs_stages)
    check_delays(state, edges, ahead)
    open_edges, stale = edges, ()
    if edges.delayed:
        open_edges, stale = programs.open_and_hear(edges, state.stale, state.step)
    batch = Batch(images, labels, recorded, how.where, how.mixed, stale)
    at_once = functools.partial(
        _passes, edges=open_edges, progress=progress, how=how, placement=placement, meet=meet
    )
    in_parts = functools.partial(_passes_in_parts, at_once, how.accumulate, placement)
    made = (at_once if how.accumulate == 1 else in_parts)(state, batch)
    said = _said_ahead(state, edges, ahead, how, placement)
    params, opt_state = list(state.params), list(state.opt_state)
    model_state, metrics = list(made.model_state), made.metrics
    distances: list[jax.Array | None] = [None] * len(priors)
    for i, (pullback, prior, place) in enumerate(
        zip(made.pullbacks, priors, placement, strict=True)
    ):
        if pullback is None:
            continue
        loss = jax.device_put(made.losses[i], whole(place))
        update = pullback, made.gradients[i], params[i], opt_state[i], loss
        if prior is None:
            params[i], opt_state[i] = programs.backward_and_update(optimizers[i])(*update)
        else:
            extra = jax.device_put((prior, progress), whole(place))
            backward = programs.backward_with_prior(optimizers[i])
            params[i], opt_state[i], distance = backward(*update, *extra)
            distances[i] = jax.device_put(distance, whole(placement[0]))
    for average in how.derived.averages:
        i, source = average.node, average.source
        new = jax.device_put((params[source], model_state[source]), whole(placement[i]))
        params[i], model_state[i] = programs.move((params[i], model_state[i]), new, average.decay)
    if any(distance is not None for distance in distances):
        metrics |= programs.distances_of(distances)
    new_step = programs.next_step(state.step)
    new = tuple(params), tuple(model_state), tuple(opt_state), new_step, said
    return GraphState(*new), metrics


class _Passes(NamedTuple):
    """What the passes of all nodes made.

    Of each node the pullback, which makes its parameters' gradients of those of what it puts out
    and of its connectors (None: it does not learn), these gradients, its model state and its loss;
    and the metrics.
    """

    pullbacks: Sequence[Any]
    gradients: Sequence[Any]
    model_state: Sequence[PyTree]
    losses: Sequence[jax.Array]
    metrics: Metrics


def _passes(
    state: GraphState,
    batch: Batch,
    *,
    edges: EdgeArrays,
    progress: ArrayLike,
    how: StepOptions,
    placement: Placement,
    meet: Callable[[list[Any]], list[Any]] | None,
) -> _Passes:
    """The forward passes of all nodes, and the gradients of the whole graph."""
    home, with_stages = placement[0], edges.needs_stages
    outputs, pullbacks, model_state = _forwards(state, batch, how, placement, with_stages)
    if meet is not None:
        outputs = meet(outputs)
    if how.ensembles:
        outputs = programs.fill_ensembles(outputs, how.derived.ensembles)
    outputs = heard_with(outputs, batch.stale, edges)
    connectors = [without_connectors(each)[1] for each in state.params]
    (output_gradients, connector_gradients), metrics, losses = programs.gradients_and_losses(
        outputs,
        batch.labels,
        edges,
        progress,
        where=batch.where,
        connectors=jax.device_put(connectors, whole(home)),
        mixed=batch.mixed,
    )
    gradients = [
        None
        if pullback is None
        else (
            jax.device_put(output_gradients[i], split(place)),
            jax.device_put(connector_gradients[i], whole(place)),
        )
        for i, (pullback, place) in enumerate(zip(pullbacks, placement, strict=True))
    ]
    return _Passes(pullbacks, gradients, model_state, losses, metrics)


def _said_ahead(
    state: GraphState,
    edges: EdgeArrays,
    ahead: Mapping[int, Mapping[Place, jax.Array]] | None,
    how: StepOptions,
    placement: Placement,
) -> tuple[Any, ...]:
    """The state's `stale` after an update."""
    after = []
    for (i, delay, _), ring in zip(edges.delayed, state.stale, strict=True):
        if ring is not None:
            assert ahead is not None  # or check_delays would have raised
            convolution = cpu_convolution().name
            forward = programs.frozen_forward(how.node_fns[i], edges.needs_stages, convolution)
            made = forward(state.params[i], state.model_state[i], ahead[delay][placement[i]])
            ring = programs.push(ring, jax.device_put(made, whole(placement[0])), state.step)
        after.append(ring)
    return tuple(after)


def _passes_in_parts(
    at_once: Callable[[GraphState, Batch], _Passes],
    parts: int,
    placement: Placement,
    state: GraphState,
    batch: Batch,
) -> _Passes:
    """As `_passes`, of equal parts of the batch; the gradients are the parameters' already."""
    check_parts(len(batch.labels), parts)
    weights = weights_of_parts(batch.where, parts, None)
    gradients: list[Any] = [None] * len(placement)
    sums: Any = None
    for index in range(parts):
        images = {to: programs.cut_part(x, parts, index) for to, x in batch.images.items()}
        others = programs.cut_part(batch._replace(images={}), parts, index)
        part = others._replace(images=images)
        made = at_once(state, part)
        state = dataclasses.replace(state, model_state=tuple(made.model_state))
        for i, (pullback, place) in enumerate(zip(made.pullbacks, placement, strict=True)):
            if pullback is not None:
                weight = jax.device_put(weights[index], whole(place))
                pulled = programs.pull_back(pullback, made.gradients[i])
                gradients[i] = programs.add(gradients[i], pulled, weight)
        sums = programs.add(sums, (made.losses, made.metrics), weights[index])
    pullbacks = [None if gradient is None else programs.AS_IT_IS for gradient in gradients]
    return _Passes(pullbacks, gradients, state.model_state, *sums)


def _forwards(
    state: GraphState, batch: Batch, how: StepOptions, placement: Placement, with_stages: bool
) -> tuple[list[Any], list[Any], list[PyTree]]:
    """What each node puts out, in the first node's place; its pullback, and its model state.

    A node that does not learn has None for a pullback, and an ensemble for what it puts out.
    """
    home, frozen, convolution = placement[0], state.frozen, cpu_convolution().name
    outputs: list[Any] = []
    pullbacks: list[Any] = []
    model_state = list(state.model_state)
    for i, (fns, place) in enumerate(zip(how.node_fns, placement, strict=True)):
        if i in batch.recorded or i in how.ensembles:
            outputs.append(jax.device_put(batch.recorded.get(i), split(home)))
            pullbacks.append(None)
            continue
        inputs = state.params[i], state.model_state[i], batch.images[place]
        with errors_of(f"node {i}"):
            if i in frozen:
                forward = programs.frozen_forward(fns, with_stages, convolution)
                output, pullback = forward(*inputs), None
            else:
                forward = programs.forward_with_pullback(fns, with_stages, convolution, how.remat)
                output, pullback, model_state[i] = forward(*inputs)
            check_for_labels(output.logits if with_stages else output, batch.labels)
        outputs.append(jax.device_put(output, split(home)))
        pullbacks.append(pullback)
    return outputs, pullbacks, model_state
