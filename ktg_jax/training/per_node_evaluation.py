"""Evaluation node by node: `eval_step` with one executable a model, nodes in their places."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.graph.derived import Ensemble
from ktg_jax.models.network import NO_NETWORK, NodeFns
from ktg_jax.models.returned import check_for_labels, errors_of
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays, Views
from ktg_jax.training.evaluation import Means, evaluation_batch, evaluation_batches, means_of
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.placement import Place, Placement, devices_of, split
from ktg_jax.training.state import GraphState


def per_node_eval(
    state: GraphState,
    images: Mapping[Place, jax.Array],
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
        images: as for `per_node_step`.
        labels: int `[B]`, likewise.
        mask: bool `[B]`, which samples count, likewise; None: all.
        node_fns: one a node; equal ones share their executables.
        placement: the place of each node.
        ensembles: those among the nodes.

    Returns:
        As `eval_step`: `loss` and `correct` `[N]`, `ensemble_loss`, `ensemble_correct` and `count`
        `[]`, float32, in the first node's place.

    Raises:
        InputError: as `eval_step`.
    """
    logits: list[Any] = []
    for i, (fns, place) in enumerate(zip(node_fns, placement, strict=True)):
        if fns == NO_NETWORK:
            logits.append(None)
            continue
        inputs = state.params[i], state.model_state[i], images[place]
        with errors_of(f"node {i}"):
            output = programs.frozen_forward(fns, False, cpu_convolution().name)(*inputs)
            check_for_labels(output, labels)
        logits.append(jax.device_put(output, split(placement[0])))
    return programs.sums_of(tuple(logits), labels, mask, ensembles)


def make_per_node_evaluator(
    node_fns: Sequence[NodeFns],
    placement: Placement,
    batch_size: int,
    ensembles: tuple[Ensemble, ...] = (),
) -> Callable[[GraphState, dict[Place, Arrays]], Means]:
    """`make_evaluator` node by node, with the data in each of the placement's places."""
    used = tuple(dict.fromkeys(placement))
    several = math.lcm(*(len(devices_of(place)) for place in used))
    batch_size = -(-batch_size // several) * several

    batches = batches_in_places(batch_size, used)

    def evaluate(state: GraphState, data: dict[Place, Arrays]) -> Means:
        sums = []
        for made in batches(data):
            images = {to: images for to, (images, _, _) in made.items()}
            _, labels, mask = made[placement[0]]
            how: dict[str, Any] = {"placement": placement, "ensembles": ensembles}
            sums.append(per_node_eval(state, images, labels, mask, node_fns=node_fns, **how))
        return means_of(sums)

    return evaluate


def batches_in_places(
    size: int, places: Sequence[Place]
) -> Callable[[Mapping[Place, Arrays]], Iterator[dict[Place, tuple[Any, ...]]]]:
    """A function that gives the batches of an evaluation in each place: see `evaluation_batch`.

    Args:
        size: of a batch.
        places: that need them; streamed images are read once for all.
    """
    one_for_all = evaluation_batches(size, None, lambda views: views)

    def batches(data: Mapping[Place, Arrays]) -> Iterator[dict[Place, tuple[Any, ...]]]:
        for seen, start in one_for_all(data[places[0]]):
            here = dict(data)
            if isinstance(seen.images, Views):
                for to in places:
                    images = jax.device_put(seen.images, split(to))
                    here[to] = data[to]._replace(images=images)
            yield {
                to: batch_at(here[to], start, size=size, spread=spread_over(to)) for to in places
            }

    return batches


def spread_over(place: Place) -> Parallel | None:
    """How a batch is split over the devices of a place; None: it has one."""
    return Parallel("jit", devices_of(place)) if isinstance(place, Mesh) else None


@functools.partial(jax.jit, static_argnames=("size", "spread"))
def batch_at(
    data: Arrays, start: int, *, size: int, spread: Parallel | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`evaluation_batch` of so many images from a start on, in one place."""
    position = start + jnp.arange(size)
    if spread is None:
        return evaluation_batch(data, position)
    return evaluation_batch(data, spread.shard(position), spread.rows)
