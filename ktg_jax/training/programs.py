"""What a step node by node is put together from, each compiled once for each model and kept."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ktg_jax.connectors import with_connectors, without_connectors
from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.training.accumulate import added, part_of_batch, zeros_of
from ktg_jax.training.delays import heard, of_nodes, opened, pushed
from ktg_jax.training.derived import moved, with_ensembles
from ktg_jax.training.evaluation import eval_sums
from ktg_jax.training.forward import node_forward
from ktg_jax.training.gradients import graph_gradients
from ktg_jax.training.node_terms import NodeTerm, distance_metrics
from ktg_jax.training.recorded import taken
from ktg_jax.training.updates import node_update


@jax.jit
@functools.wraps(graph_gradients)
def gradients_and_losses(*inputs: Any, **options: Any) -> Any:
    """What `graph_gradients` returns, and each node's loss apart: a scalar for its device."""
    gradients, metrics = graph_gradients(*inputs, **options)
    return gradients, of_nodes(metrics, inputs[2]), tuple(metrics["loss"])


distances_of = jax.jit(distance_metrics)
fill_ensembles = jax.jit(with_ensembles, static_argnums=1)
move = jax.jit(moved, static_argnums=2)
sums_of = jax.jit(eval_sums, static_argnums=3)
next_step = jax.jit(lambda step: step + 1)
cut_part = jax.jit(part_of_batch, static_argnums=(1, 2))


push = jax.jit(pushed, donate_argnums=0)


metrics_of_nodes = jax.jit(of_nodes)
rows_of_images = jax.jit(taken)


@jax.jit
def closed_alike(gates: jax.Array, opened: jax.Array, closed: jax.Array) -> jax.Array:
    """These gates, those cut that are cut among the opened ones and are not among the others."""
    is_shut = (opened != closed) if gates.ndim == 2 else (opened != closed).any(-1, keepdims=True)
    return jnp.where(is_shut, opened, gates)


@jax.jit
def open_and_hear(edges: EdgeArrays, stale: tuple[Any, ...], step: jax.Array) -> Any:
    """The edges that are open in an update, and what stale senders said for it."""
    both = zip(edges.delayed, stale, strict=True)
    said = (None if ring is None else heard(ring, step, each.delay) for each, ring in both)
    return opened(edges, step), tuple(said)


@functools.lru_cache(maxsize=256)
def forward_with_pullback(
    fns: NodeFns, with_stages: bool, convolution: str, remat: bool
) -> Callable[..., Any]:
    """`(params, model_state, images) -> (output, pullback, model_state)` of a node that learns."""
    del convolution  # what is traced with one is not used with another

    def forward(params: PyTree, model_state: PyTree, images: jax.Array) -> Any:
        of_params = functools.partial(
            node_forward,
            model_state=model_state,
            images=images,
            fns=fns,
            with_stages=with_stages,
            remat=remat,
        )
        return jax.vjp(of_params, params, has_aux=True)

    return jax.jit(forward)


@functools.lru_cache(maxsize=256)
def frozen_forward(fns: NodeFns, with_stages: bool, convolution: str) -> Callable[..., Any]:
    """`(params, model_state, images) -> output` of a node that does not learn."""
    del convolution  # as above

    def forward(params: PyTree, model_state: PyTree, images: jax.Array) -> Any:
        how: dict[str, Any] = {"fns": fns, "frozen": True, "with_stages": with_stages}
        return node_forward(params, model_state, images, **how)[0]

    return jax.jit(forward)


def _gradients(pullback: Any, of_output: Any, of_connectors: dict[str, Any]) -> PyTree:
    """Those of a node's parameters, from those of what it puts out and of its connectors."""
    (gradients,) = pullback(of_output)
    return with_connectors(gradients, of_connectors) if of_connectors else gradients


AS_IT_IS = jax.tree_util.Partial(lambda gradients: (gradients,))
"""The pullback of a node whose gradients are its parameters' already."""


@jax.jit
def pull_back(pullback: Any, gradient: Any) -> tuple[PyTree, dict[str, Any]]:
    """The gradients of a node's parameters and of its connectors, in place of its outputs'."""
    gradients = _gradients(pullback, *gradient)
    return without_connectors(gradients)


@jax.jit
def add(total: Any, new: Any, weight: jax.Array) -> Any:
    """The sum of what there is, if anything, and weight times what is new."""
    return added(zeros_of(new) if total is None else total, new, weight)


@functools.lru_cache(maxsize=256)
def backward_and_update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """`(pullback, gradient, params, opt_state, loss) -> (params, opt_state)` of a node."""

    def update(
        pullback: Any, gradient: Any, params: PyTree, opt_state: Any, loss: jax.Array
    ) -> Any:
        gradients = _gradients(pullback, *gradient)
        return node_update(params, opt_state, gradients, optimizer=optimizer, value=loss)

    # The pullback may hold the parameters themselves: only the optimiser's state can be reused.
    return jax.jit(update, donate_argnums=3)


@functools.lru_cache(maxsize=256)
def backward_with_prior(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """As `backward_and_update`, with a prior and the progress; it also returns distances."""

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
