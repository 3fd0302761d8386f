"""Which node computes on which device: balanced by what nodes cost."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.connectors import without_connectors
from ktg_jax.cpu.convolution import formulation
from ktg_jax.models.network import NO_NETWORK, NodeFns, PyTree
from ktg_jax.training.state import GraphState

Placement = tuple[jax.Device, ...]


def forward_cost(
    fns: NodeFns, params: PyTree, model_state: PyTree, image_shape: Sequence[int]
) -> float:
    """Floating point operations of a forward pass on one image `[H, W, C]`, by XLA's count.

    >>> def apply(params, model_state, images, train):
    ...     return images.reshape(len(images), -1) @ params, model_state
    >>> linear = NodeFns(init=lambda rng, images: (jnp.ones((64, 10)), {}), apply=apply)
    >>> forward_cost(linear, jnp.ones((64, 10)), {}, (8, 8, 1))
    1280.0
    """
    params, _ = without_connectors(params)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with formulation("xla"):  # whose operations the compiler knows
        forward = jax.jit(lambda params, state, images: fns.apply(params, state, images, False)[0])
        lowered = forward.lower(params, model_state, images)
    cost = lowered.cost_analysis() or {}
    return float(cost.get("flops", 0.0))


def balanced(costs: Sequence[float], devices: Sequence[jax.Device]) -> Placement:
    """A device for each node, so that none has much more to do than the others.

    The dearest node first, each to the device with the least to do.

    Args:
        costs: one a node, in any unit.
        devices: at least one.

    >>> device = jax.local_devices()[0]
    >>> balanced([1.0, 3.0], [device]) == (device, device)
    True
    """
    load = [0.0] * len(devices)
    placement = [devices[0]] * len(costs)
    for node in sorted(range(len(costs)), key=lambda node: (-costs[node], node)):
        device = load.index(min(load))
        placement[node] = devices[device]
        load[device] += costs[node]
    return tuple(placement)


def place(state: GraphState, placement: Placement) -> GraphState:
    """Moves every node to its device, and the step to the first node's."""

    def move(trees: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(jax.device_put(tree, to) for tree, to in zip(trees, placement, strict=True))

    return GraphState(
        move(state.params),
        move(state.model_state),
        move(state.opt_state),
        jax.device_put(state.step, placement[0]),
    )


def node_placement(
    node_fns: Sequence[NodeFns],
    state: GraphState,
    devices: Sequence[jax.Device],
    image_shape: Sequence[int],
) -> Placement:
    """A device for each node, balanced by the nodes' cost; the arguments as for the engine."""
    if len(devices) == 1:
        return (devices[0],) * len(node_fns)
    costs: dict[NodeFns, float] = {}
    costs[NO_NETWORK] = 0.0
    for i, fns in enumerate(node_fns):
        if fns not in costs:
            costs[fns] = forward_cost(fns, state.params[i], state.model_state[i], image_shape)
    # A backward pass costs about two forward passes.
    passes = [1 if i in state.frozen else 3 for i in range(len(node_fns))]
    return balanced([n * costs[f] for n, f in zip(passes, node_fns, strict=True)], devices)
