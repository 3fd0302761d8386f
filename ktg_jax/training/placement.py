"""Which node computes where, balanced by what nodes cost: on a device, or on a group of them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ktg_jax.connectors import without_connectors
from ktg_jax.cpu.convolution import formulation
from ktg_jax.models.network import NO_NETWORK, NodeFns, PyTree
from ktg_jax.training.parallel import AXIS
from ktg_jax.training.state import GraphState

Place: TypeAlias = jax.Device | Mesh
"""A device, or a group of them over which the node's batch is split."""

Placement: TypeAlias = tuple[Place, ...]

PLACEMENTS = ("data", "nodes", "nodes+data")
"""Each node on all devices, on one device, or on a group of devices."""


def place_of(devices: Sequence[jax.Device]) -> Place:
    """The place that these devices are.

    >>> place_of(jax.local_devices()[:1]) == jax.local_devices()[0]
    True
    """
    if len(devices) == 1:
        return devices[0]
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def devices_of(place: Place) -> tuple[jax.Device, ...]:
    """The devices of a place."""
    return tuple(place.devices.flat) if isinstance(place, Mesh) else (place,)


def whole(place: Place) -> jax.Device | Sharding:
    """Where to put what all devices of a place have whole."""
    return NamedSharding(place, PartitionSpec()) if isinstance(place, Mesh) else place


def split(place: Place) -> jax.Device | Sharding:
    """Where to put what is split over the devices of a place along its first axis."""
    return NamedSharding(place, PartitionSpec(AXIS)) if isinstance(place, Mesh) else place


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


def grouped(costs: Sequence[float], devices: Sequence[jax.Device], batch_size: int) -> Placement:
    """A group of devices for each node, larger for nodes that cost more.

    With fewer devices than nodes it is `balanced`. A group is of a size that divides the batch; a
    node that costs nothing is where the first is.

    Args:
        costs: one a node, in any unit.
        devices: at least one.
        batch_size: of all devices together.

    >>> device = jax.local_devices()[0]
    >>> grouped([1.0, 0.0], [device], 64) == (device, device)
    True
    """
    busy = [i for i, cost in enumerate(costs) if cost > 0 or i == 0]
    if len(devices) <= len(busy):
        return balanced(costs, devices)
    sizes = dict.fromkeys(busy, 1)
    left = len(devices) - len(busy)
    divisors = [size for size in range(1, len(devices) + 1) if batch_size % size == 0]
    while left:
        for node in sorted(busy, key=lambda node: (-costs[node] / sizes[node], node)):
            larger = [size for size in divisors if 0 < size - sizes[node] <= left]
            if larger:
                left -= larger[0] - sizes[node]
                sizes[node] = larger[0]
                break
        else:
            break
    starts = np.cumsum([0, *sizes.values()])
    groups = {
        node: place_of(devices[start : start + size])
        for (node, size), start in zip(sizes.items(), starts, strict=False)
    }
    return tuple(groups.get(node, groups[0]) for node in range(len(costs)))


def place(state: GraphState, placement: Placement) -> GraphState:
    """Moves every node to its place, and the step to the first node's."""

    def move(trees: Sequence[Any]) -> tuple[Any, ...]:
        places = zip(trees, placement, strict=True)
        return tuple(jax.device_put(tree, whole(to)) for tree, to in places)

    return GraphState(
        move(state.params),
        move(state.model_state),
        move(state.opt_state),
        *jax.device_put((state.step, state.stale), whole(placement[0])),
    )


def node_placement(
    node_fns: Sequence[NodeFns],
    state: GraphState,
    devices: Sequence[jax.Device],
    image_shape: Sequence[int],
    batch_size: int,
    how: str = "nodes",
) -> Placement:
    """A place for each node, by the nodes' cost.

    Args:
        node_fns: one a node.
        state: whose frozen nodes and shapes count, not its values.
        devices: at least one.
        image_shape: `(H, W, C)`.
        batch_size: of all devices together.
        how: one of `PLACEMENTS`.
    """
    if len(devices) == 1 or how == "data":
        return (place_of(devices),) * len(node_fns)
    of_nodes = node_costs(node_fns, state, image_shape)
    if how == "nodes":
        return balanced(of_nodes, devices)
    return grouped(of_nodes, devices, batch_size)


def node_costs(
    node_fns: Sequence[NodeFns], state: GraphState, image_shape: Sequence[int]
) -> list[float]:
    """What an update of each node costs, per image: the arguments are as for `node_placement`."""
    costs: dict[NodeFns, float] = {}
    costs[NO_NETWORK] = 0.0
    for i, fns in enumerate(node_fns):
        if fns not in costs:
            costs[fns] = forward_cost(fns, state.params[i], state.model_state[i], image_shape)
    # A backward pass costs about two forward passes.
    passes = [1 if i in state.frozen else 3 for i in range(len(node_fns))]
    return [n * costs[f] for n, f in zip(passes, node_fns, strict=True)]
