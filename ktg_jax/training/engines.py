"""Engines: two ways to run the same training, behind one interface.

`fused` is the single compiled step of `train_step`; `per_node` composes the same pieces node by
node, with one executable for each model. Both give the same updates to float rounding.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ktg_jax.errors import InputError
from ktg_jax.models.network import NodeFns
from ktg_jax.training.batches import plan_batch, steps_per_epoch, take_batch
from ktg_jax.training.loop import (
    Arrays,
    Means,
    evaluation_batch,
    evaluation_batch_size,
    make_evaluator,
    make_train_step,
    means_of,
)
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.per_node import (
    Placement,
    balanced,
    forward_cost,
    per_node_eval,
    per_node_step,
    place,
)
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import Metrics
from ktg_jax.transfer import EdgeArrays

ENGINES = ("fused", "per_node")


class Batches(NamedTuple):
    """How batches are made from the training images.

    Attributes:
        num_images: size of the data.
        batch_size: of all devices together.
        max_offset: as in `plan_batch`.
        flip: as in `plan_batch`.
    """

    num_images: int
    batch_size: int
    max_offset: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Engine:
    """Runs a training.

    Attributes:
        name: one of `ENGINES`.
        place: puts a state, or a copy of it, where the engine wants it.
        load: puts images and labels where the engine wants them.
        make_step: `make_step(data, edges, key, priors=None)` returns `step(state, count) ->
            (state, metrics)`, which consumes the state; data as `load` returns it, priors as for
            `train_step`.
        evaluate: `evaluate(state, data)` returns every node's and the ensemble's means, as
            `make_evaluator` describes.
        summary: in a few words.
    """

    name: str
    place: Callable[[GraphState], GraphState]
    load: Callable[[Arrays], Any]
    make_step: Callable[..., Callable[[GraphState, int], Any]]
    evaluate: Callable[[GraphState, Any], Means]
    summary: str


def choose_engine(name: str, parallel: Parallel, steps_per_call: int = 1) -> str:
    """The engine that `auto` stands for; other names as they are.

    On CPUs it is `per_node`, where nothing is gained by compiling a graph whole; on accelerators
    `fused`, whose one program keeps a device busy.

    Raises:
        InputError: no such engine, or one that cannot do what is asked.
    """
    if name == "auto":
        on_cpu = parallel.devices[0].platform == "cpu"
        plain = parallel.strategy == "jit" and steps_per_call == 1
        return "per_node" if on_cpu and plain else "fused"
    if name not in ENGINES:
        raise InputError("engine", name, f"auto, {', '.join(ENGINES)}")
    if name == "per_node" and parallel.strategy != "jit":
        raise InputError("parallel", parallel.strategy, "jit with the engine per_node")
    if name == "per_node" and steps_per_call != 1:
        raise InputError("steps_per_call", steps_per_call, "1 with the engine per_node")
    return name


def fused_engine(
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    parallel: Parallel,
    batches: Batches,
    *,
    image_shape: Sequence[int],
    total_steps: int,
) -> Engine:
    """The whole graph in one program, its batch split over all devices.

    Args:
        node_fns: one a node.
        optimizer: as given to `init_state`.
        parallel: devices and strategy.
        batches: of the training.
        image_shape: `(H, W, C)`.
        total_steps: k_end of the gates' progress.

    Raises:
        InputError: a batch larger than the data, or not divisible by the number of devices.
    """

    @functools.cache
    def compiled(count: int) -> Callable[..., Any]:
        return make_train_step(
            node_fns,
            optimizer,
            parallel,
            total_steps=total_steps,
            steps_per_call=count,
            **batches._asdict(),
        )

    compiled(1)  # checks the batch size; compiles nothing yet

    def make_step(
        data: Arrays, edges: EdgeArrays, key: jax.Array, priors: Priors | None = None
    ) -> Callable[[GraphState, int], Any]:
        inputs = parallel.replicate((jax.tree.map(jnp.asarray, edges), key, priors))
        return lambda state, count: compiled(count)(state, data, *inputs)

    platform = parallel.devices[0].platform
    return Engine(
        name="fused",
        place=parallel.replicate,
        load=lambda arrays: parallel.replicate(Arrays(*map(jnp.asarray, arrays))),
        make_step=make_step,
        evaluate=make_evaluator(node_fns, parallel, evaluation_batch_size(image_shape, platform)),
        summary=f"{_devices(parallel.devices)} ({parallel.strategy})",
    )


def per_node_engine(
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    state: GraphState,
    devices: Sequence[jax.Device],
    batches: Batches,
    *,
    image_shape: Sequence[int],
    total_steps: int,
) -> Engine:
    """Each node on one device, balanced by cost; only what nodes put out travels.

    Args:
        node_fns: one a node; equal ones share their executables.
        optimizer: as given to `init_state`.
        state: from `init_state`; its frozen nodes and shapes count, not its values.
        devices: over which the nodes are spread.
        batches: of the training.
        image_shape: `(H, W, C)`.
        total_steps: k_end of the gates' progress.

    Raises:
        InputError: a batch larger than the data.
    """
    steps_per_epoch(batches.num_images, batches.batch_size)
    placement = node_placement(node_fns, state, devices, image_shape)
    used = tuple(dict.fromkeys(placement))

    def load(arrays: Arrays) -> dict[jax.Device, Arrays]:
        return {to: jax.device_put(Arrays(*map(jnp.asarray, arrays)), to) for to in used}

    def make_step(
        data: dict[jax.Device, Arrays],
        edges: EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
    ) -> Callable[[GraphState, int], tuple[GraphState, Metrics]]:
        home = placement[0]
        keys = {to: jax.device_put(key, to) for to in used}
        edges = jax.device_put(jax.tree.map(jnp.asarray, edges), home)
        if priors is not None:
            priors = [jax.device_put(p, to) for p, to in zip(priors, placement, strict=True)]

        def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
            del count  # always 1
            made = {
                to: _make_batch(
                    data[to], keys[to], jax.device_put(state.step, to), total_steps, batches=batches
                )
                for to in used
            }
            _, labels, progress = made[home]
            return per_node_step(
                state,
                {to: images for to, (images, _, _) in made.items()},
                labels,
                edges,
                progress,
                node_fns=node_fns,
                optimizer=optimizer,
                placement=placement,
                priors=priors,
            )

        return step

    return Engine(
        name="per_node",
        place=lambda state: place(state, placement),
        load=load,
        make_step=make_step,
        evaluate=make_per_node_evaluator(
            node_fns, placement, evaluation_batch_size(image_shape, devices[0].platform)
        ),
        summary=f"{_devices(used)} (node by node)",
    )


def make_per_node_evaluator(
    node_fns: Sequence[NodeFns], placement: Placement, batch_size: int
) -> Callable[[GraphState, dict[jax.Device, Arrays]], Means]:
    """`make_evaluator` node by node, with the data on each of the placement's devices."""
    used = tuple(dict.fromkeys(placement))

    def evaluate(state: GraphState, data: dict[jax.Device, Arrays]) -> Means:
        sums = []
        for start in range(0, len(data[placement[0]].labels), batch_size):
            made = {to: _evaluation_batch(data[to], start, size=batch_size) for to in used}
            images = {to: images for to, (images, _, _) in made.items()}
            _, labels, mask = made[placement[0]]
            sums.append(
                per_node_eval(state, images, labels, mask, node_fns=node_fns, placement=placement)
            )
        return means_of(sums)

    return evaluate


@functools.partial(jax.jit, static_argnames="batches")
def _make_batch(
    data: Arrays, key: jax.Array, step: jax.Array, total_steps: int, *, batches: Batches
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images and labels of the next step, and the gates' progress in it."""
    images, labels = take_batch(*data, plan_batch(key, step, **batches._asdict()))
    return images, labels, (step + 1) / total_steps


@functools.partial(jax.jit, static_argnames="size")
def _evaluation_batch(
    data: Arrays, start: int, *, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return evaluation_batch(data, start + jnp.arange(size))


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
    for i, fns in enumerate(node_fns):
        if fns not in costs:
            costs[fns] = forward_cost(fns, state.params[i], state.model_state[i], image_shape)
    # A backward pass costs about two forward passes.
    passes = [1 if i in state.frozen else 3 for i in range(len(node_fns))]
    return balanced([n * costs[f] for n, f in zip(passes, node_fns, strict=True)], devices)


def _devices(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"
