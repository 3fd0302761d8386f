"""The training step node by node: one executable for each model instead of one for each graph.

Nodes meet only in what they put out: logits, and stage outputs where edges compare them. So a
node's forward pass (with its pullback), the losses of the graph, and a node's update are compiled
apart, once for each distinct model: any graph over models that are already compiled, with any gates
and any frozen nodes, starts at once. Every node lives on one device, and only what nodes put out
travels between devices. `train_step` is the reference: both give the same update to float rounding.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.connectors import with_connectors, without_connectors
from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.graph.derived import Ensemble
from ktg_jax.models.network import NO_NETWORK, NodeFns, PyTree
from ktg_jax.models.returned import check_for_labels, errors_of
from ktg_jax.training.batches import Arrays
from ktg_jax.training.derived import moved, with_ensembles
from ktg_jax.training.evaluation import Means, eval_sums, evaluation_batch, means_of
from ktg_jax.training.forward import node_forward
from ktg_jax.training.node_terms import NodeTerm, checked_priors, distance_metrics
from ktg_jax.training.placement import Placement
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import (
    Metrics,
    StepOptions,
    checked_recorded,
    graph_gradients,
)
from ktg_jax.training.updates import check_states, node_update


def per_node_step(
    state: GraphState,
    images: Mapping[jax.Device, jax.Array],
    labels: jax.Array,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    *,
    placement: Placement,
    **options: Any,
) -> tuple[GraphState, Metrics]:
    """One update of every node, like `train_step`; composes compiled pieces and is not jitted.

    Args:
        state: as `place` returns it; its optimiser states are consumed.
        images: float `[B, H, W, C]`, as for `node_forward`, on each device that has nodes.
        labels: int `[B]`, on the first node's device.
        gates: as for `train_step`.
        progress: scalar in (0, 1].
        placement: the device of each node.
        **options: the fields of `StepOptions`. Equal `node_fns` share their executables; `priors`
            are best already on their nodes' devices; `where`, `recorded` and `mixed` are to be on
            the first node's.

    Returns:
        The new state, and the metrics of `train_step` on the first node's device.

    Raises:
        InputError: as `train_step`.

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
    home = placement[0]
    how = StepOptions(**options)
    optimizers = how.optimizers
    priors = checked_priors(how.priors, state)
    check_states(state.opt_state, state.params, optimizers)
    edges = edge_arrays(gates, how.temperature)
    with_stages = edges.needs_stages
    recorded = checked_recorded(how, state, labels, with_stages)
    outputs, pullbacks, model_state = _forwards(
        state, images, labels, how, recorded, placement, with_stages
    )
    if how.ensembles:
        outputs = _with_ensembles(outputs, how.derived.ensembles)
    connectors = [without_connectors(each)[1] for each in state.params]
    (output_gradients, connector_gradients), metrics, losses = _graph_gradients(
        outputs,
        labels,
        edges,
        progress,
        where=how.where,
        connectors=jax.device_put(connectors, home),
        mixed=how.mixed,
    )

    params, opt_state = list(state.params), list(state.opt_state)
    distances: list[jax.Array | None] = [None] * len(priors)
    for i, (pullback, prior, device) in enumerate(zip(pullbacks, priors, placement, strict=True)):
        if pullback is None:
            continue
        gradient, loss = jax.device_put(
            ((output_gradients[i], connector_gradients[i]), losses[i]), device
        )
        update = pullback, gradient, params[i], opt_state[i], loss
        if prior is None:
            params[i], opt_state[i] = _backward_and_update(optimizers[i])(*update)
        else:
            extra = jax.device_put((prior, progress), device)
            params[i], opt_state[i], distance = _backward_with_prior(optimizers[i])(*update, *extra)
            distances[i] = jax.device_put(distance, home)
    for average in how.derived.averages:
        i, source = average.node, average.source
        new = jax.device_put((params[source], model_state[source]), placement[i])
        params[i], model_state[i] = _moved((params[i], model_state[i]), new, average.decay)
    if any(distance is not None for distance in distances):
        metrics |= _distance_metrics(distances)
    new_step = _next(state.step)
    return GraphState(tuple(params), tuple(model_state), tuple(opt_state), new_step), metrics


def _forwards(
    state: GraphState,
    images: Mapping[jax.Device, jax.Array],
    labels: jax.Array,
    how: StepOptions,
    recorded: Mapping[int, Any],
    placement: Placement,
    with_stages: bool,
) -> tuple[list[Any], list[Any], list[PyTree]]:
    """What each node puts out, on the first node's device; its pullback, and its model state.

    A node that does not learn has None for a pullback, and an ensemble for what it puts out.
    """
    home, frozen, convolution = placement[0], state.frozen, cpu_convolution().name
    outputs: list[Any] = []
    pullbacks: list[Any] = []
    model_state = list(state.model_state)
    for i, (fns, device) in enumerate(zip(how.node_fns, placement, strict=True)):
        if i in recorded or i in how.ensembles:
            outputs.append(jax.device_put(recorded.get(i), home))
            pullbacks.append(None)
            continue
        inputs = state.params[i], state.model_state[i], images[device]
        with errors_of(f"node {i}"):
            if i in frozen:
                output, pullback = _frozen_forward(fns, with_stages, convolution)(*inputs), None
            else:
                forward = _forward_with_pullback(fns, with_stages, convolution)
                output, pullback, model_state[i] = forward(*inputs)
            check_for_labels(output.logits if with_stages else output, labels)
        outputs.append(jax.device_put(output, home))
        pullbacks.append(pullback)
    return outputs, pullbacks, model_state


def per_node_eval(
    state: GraphState,
    images: Mapping[jax.Device, jax.Array],
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    node_fns: Sequence[NodeFns],
    placement: Placement,
    ensembles: tuple[Ensemble, ...] = (),
) -> Metrics:
    """`eval_step` node by node: the same sums.

    Args:
        state: as `place` returns it.
        images: float `[B, H, W, C]`, as for `node_forward`, on each device that has nodes.
        labels: int `[B]`, on the first node's device.
        mask: bool `[B]`, which samples count, likewise; None: all.
        node_fns: one a node; equal ones share their executables.
        placement: the device of each node.
        ensembles: those among the nodes.

    Returns:
        As `eval_step`: `loss` and `correct` `[N]`, `ensemble_loss`, `ensemble_correct` and `count`
        `[]`, float32, on the first node's device.

    Raises:
        InputError: as `eval_step`.
    """
    logits: list[Any] = []
    for i, (fns, device) in enumerate(zip(node_fns, placement, strict=True)):
        if fns == NO_NETWORK:
            logits.append(None)
            continue
        inputs = state.params[i], state.model_state[i], images[device]
        with errors_of(f"node {i}"):
            output = _frozen_forward(fns, False, cpu_convolution().name)(*inputs)
            check_for_labels(output, labels)
        logits.append(jax.device_put(output, placement[0]))
    return _eval_sums(tuple(logits), labels, mask, ensembles)


def make_per_node_evaluator(
    node_fns: Sequence[NodeFns],
    placement: Placement,
    batch_size: int,
    ensembles: tuple[Ensemble, ...] = (),
) -> Callable[[GraphState, dict[jax.Device, Arrays]], Means]:
    """`make_evaluator` node by node, with the data on each of the placement's devices."""
    used = tuple(dict.fromkeys(placement))

    def evaluate(state: GraphState, data: dict[jax.Device, Arrays]) -> Means:
        sums = []
        for start in range(0, len(data[placement[0]].labels), batch_size):
            made = {to: _evaluation_batch(data[to], start, size=batch_size) for to in used}
            images = {to: images for to, (images, _, _) in made.items()}
            _, labels, mask = made[placement[0]]
            how: dict[str, Any] = {"placement": placement, "ensembles": ensembles}
            sums.append(per_node_eval(state, images, labels, mask, node_fns=node_fns, **how))
        return means_of(sums)

    return evaluate


@functools.partial(jax.jit, static_argnames="size")
def _evaluation_batch(
    data: Arrays, start: int, *, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return evaluation_batch(data, start + jnp.arange(size))


@jax.jit
@functools.wraps(graph_gradients)
def _graph_gradients(*inputs: Any, **options: Any) -> Any:
    """What `graph_gradients` returns, and each node's loss apart: a scalar for its device."""
    gradients, metrics = graph_gradients(*inputs, **options)
    return gradients, metrics, tuple(metrics["loss"])


_distance_metrics = jax.jit(distance_metrics)
_with_ensembles = jax.jit(with_ensembles, static_argnums=1)
_moved = jax.jit(moved, static_argnums=2)
_eval_sums = jax.jit(eval_sums, static_argnums=3)
_next = jax.jit(lambda step: step + 1)


@functools.lru_cache(maxsize=256)
def _forward_with_pullback(fns: NodeFns, with_stages: bool, convolution: str) -> Callable[..., Any]:
    del convolution  # what is traced with one is not used with another

    def forward(params: PyTree, model_state: PyTree, images: jax.Array) -> Any:
        of_params = functools.partial(
            node_forward, model_state=model_state, images=images, fns=fns, with_stages=with_stages
        )
        return jax.vjp(of_params, params, has_aux=True)

    return jax.jit(forward)


@functools.lru_cache(maxsize=256)
def _frozen_forward(fns: NodeFns, with_stages: bool, convolution: str) -> Callable[..., Any]:
    del convolution  # as above

    def forward(params: PyTree, model_state: PyTree, images: jax.Array) -> Any:
        how: dict[str, Any] = {"fns": fns, "frozen": True, "with_stages": with_stages}
        return node_forward(params, model_state, images, **how)[0]

    return jax.jit(forward)


def _gradients(pullback: Any, of_output: Any, of_connectors: dict[str, Any]) -> PyTree:
    """Those of a node's parameters, from those of what it puts out and of its connectors."""
    (gradients,) = pullback(of_output)
    return with_connectors(gradients, of_connectors) if of_connectors else gradients


@functools.lru_cache(maxsize=256)
def _backward_and_update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def update(
        pullback: Any, gradient: Any, params: PyTree, opt_state: Any, loss: jax.Array
    ) -> Any:
        gradients = _gradients(pullback, *gradient)
        return node_update(params, opt_state, gradients, optimizer=optimizer, value=loss)

    # The pullback may hold the parameters themselves: only the optimiser's state can be reused.
    return jax.jit(update, donate_argnums=3)


@functools.lru_cache(maxsize=256)
def _backward_with_prior(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def update(
        pullback: Any,
        gradient: Any,
        params: PyTree,
        opt_state: Any,
        loss: jax.Array,
        prior: NodeTerm,
        progress: jax.Array,
    ) -> Any:
        gradients = _gradients(pullback, *gradient)
        gradients, distance = prior.add_to(gradients, params, progress)
        updated = node_update(params, opt_state, gradients, optimizer=optimizer, value=loss)
        return *updated, distance

    return jax.jit(update, donate_argnums=3)
