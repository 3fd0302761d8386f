"""Engines: ways to run the same training, behind one interface.

`FusedEngine` runs the single compiled step of `train_step`, in which nodes of one network may make
their passes together; `PerNodeEngine` composes the same pieces node by node, with one executable
for each model. All give the same updates to float rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.errors import InputError
from ktg_jax.training.batches import Arrays, Batches, labels_of, take_batch
from ktg_jax.training.delays import delays_of
from ktg_jax.training.evaluation import (
    evaluation_batch_size,
    make_evaluator,
)
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_evaluation import make_per_node_evaluator, spread_over
from ktg_jax.training.placement import PLACEMENTS, Place, devices_of, node_placement, place, whole
from ktg_jax.training.recorded import Feed, Recordings, Rows, taken
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import train_step
from ktg_jax.training.task import ENGINES, Step, Task


def choose_engine(
    name: str, parallel: Parallel, steps_per_call: int = 1, placement: str | None = None
) -> str:
    """The engine that `auto` stands for; other names as they are.

    On CPUs it is `per_node`, where nothing is gained by compiling a graph whole; on accelerators
    `fused`, whose one program keeps a device busy. Nodes in places of their own need `per_node`.

    Args:
        name: `auto`, or one of `ENGINES`.
        parallel: devices and strategy.
        steps_per_call: updates in one call.
        placement: one of `PLACEMENTS`; None: whatever the engine does.

    Raises:
        InputError: no such engine or placement, or one that cannot do what is asked.
    """
    if placement is not None and placement not in PLACEMENTS:
        raise InputError("placement", placement, ", ".join(PLACEMENTS))
    apart = ("nodes", "nodes+data")
    if name == "auto" and placement in apart:
        name = "per_node"
    if name == "auto":
        on_cpu = parallel.devices[0].platform == "cpu"
        plain = parallel.strategy == "jit" and steps_per_call == 1
        plain &= not parallel.spans_processes
        return "per_node" if on_cpu and plain else "fused"
    if name not in ENGINES:
        raise InputError("engine", name, f"auto, {', '.join(ENGINES)}")
    if name != "per_node" and placement in apart:
        raise InputError("placement", placement, f"data with the engine {name}")
    if name == "per_node" and parallel.spans_processes and placement not in apart:
        allowed = f"{' or '.join(apart)}, with the engine per_node and several processes"
        raise InputError("placement", placement, allowed)
    if name == "per_node" and parallel.strategy != "jit":
        raise InputError("parallel", parallel.strategy, "jit with the engine per_node")
    if name == "per_node" and steps_per_call != 1:
        raise InputError("steps_per_call", steps_per_call, "1 with the engine per_node")
    return name


def fused_step(
    task: Task, parallel: Parallel, steps_per_call: int = 1, *, batched: bool = False
) -> Callable[..., tuple[GraphState, Metrics]]:
    """Compiles `step(state, data, edges, key, priors=None, tables=None, rows=None, wishes=None)`.

    It makes its own batch, and returns a state and metrics; the arguments are those of
    `Engine.make_step`, `train_step` and of a `Feed`. Wishes, bool `[number of devices]` and split
    over them, say whose process wants to stop; the metric `stop` is whether any does.

    Args:
        task: what is trained.
        parallel: devices and strategy.
        steps_per_call: updates in one call; with several, the metrics are stacked along a first
            axis.
        batched: as of `train_step`.

    Raises:
        InputError: a batch that is not divisible by the number of devices.
    """
    parallel.check_batch_size(task.batches.batch_size, task.accumulate)
    find = parallel.rows if parallel.spreads_data else None

    def step(
        state: GraphState,
        data: Arrays,
        edges: EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        tables: Rows | None = None,
        rows: Rows | None = None,
        wishes: jax.Array | None = None,
    ) -> tuple[GraphState, Metrics]:
        plan = parallel.shard(task.batches.plan(key, state.step))
        recorded = taken(tables or {}, plan.image_index) | parallel.shard(rows or {})
        ahead = {
            delay: take_batch(
                data.images,
                data.labels,
                parallel.shard(task.batches.plan(key, state.step + delay)),
                find,
            )[0]
            for delay in delays_of(edges)
        }
        updated, metrics = train_step(
            state,
            *take_batch(data.images, data.labels, plan, find),
            edges,
            (state.step + 1) / task.total_steps,
            axis_name=parallel.axis_name,
            priors=priors,
            recorded=recorded,
            mixed=labels_of(data.images, data.labels, plan)[1],
            batched=batched,
            ahead=ahead,
            **task.options,
        )
        return updated, metrics | ({} if wishes is None else {"stop": parallel.any_of(wishes)})

    are_spread = [Arrays(images=parallel.spreads_data, labels=False), *[False] * 5, True]
    if steps_per_call == 1:
        return parallel.compile(step, are_spread)

    def steps(
        state: GraphState,
        data: Arrays,
        edges: EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        tables: Rows | None = None,
        rows: Rows | None = None,
        wishes: jax.Array | None = None,
    ) -> tuple[GraphState, Metrics]:
        # Unrolled on CPUs, where XLA runs the body of a loop several times slower.
        unroll = parallel.devices[0].platform == "cpu"
        return jax.lax.scan(
            lambda state, row: step(state, data, edges, key, priors, tables, row, wishes),
            state,
            rows,
            length=steps_per_call,
            unroll=unroll,
        )

    return parallel.compile(steps, are_spread)


class FusedEngine:
    """The whole graph in one program, its batch split over all devices.

    Args:
        task: what is trained.
        parallel: devices and strategy.
        batched: whether learning nodes of one network make one forward and one backward pass
            together, as in `train_step`.

    Raises:
        InputError: a batch that is not divisible by the number of devices, or pmap over several
            processes.
    """

    def __init__(self, task: Task, parallel: Parallel, *, batched: bool = False) -> None:
        self.name = "batched" if batched else "fused"
        if parallel.spans_processes and parallel.strategy == "pmap":
            raise InputError("parallel", "pmap", "jit or shard_map with several processes")
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self._parallel = parallel
        compiled = functools.partial(fused_step, task, parallel, batched=batched)
        self._compiled = functools.cache(compiled)
        self._compiled(1)  # checks the batch size; compiles nothing yet
        size = evaluation_batch_size(task.image_shape, parallel.devices[0].platform)
        self.evaluate = make_evaluator(task.node_fns, parallel, size, task.derived.ensembles)
        how = f"{parallel.strategy}, batched" if batched else parallel.strategy
        self.summary = f"{_devices(parallel.devices)} ({how})"

    def place(self, state: GraphState) -> GraphState:
        """A copy of the state on every device."""
        return self._parallel.replicate(state)

    def gathered(self, state: GraphState) -> GraphState:
        """The state as it is."""
        return state

    def load(self, arrays: Arrays) -> Arrays:
        """The labels on every device, and of the images a part on each."""
        return arrays.spread_over(self._parallel)

    def make_step(
        self,
        data: Arrays,
        edges: ArrayLike | EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        recordings: Recordings | None = None,
    ) -> Step:
        """The step of a training: see `Engine`."""
        arrays = jax.tree.map(jnp.asarray, edge_arrays(edges))
        inputs = self._parallel.replicate((arrays, key, priors))
        feed = Feed(recordings, self._parallel.replicate)

        def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
            given: list[Any] = [feed.tables, feed.rows(state, count)]
            if self._parallel.spans_processes:
                given.append(self._parallel.one_each(self.wants_to_stop()))
            made = self._compiled(count)(state, data, *inputs, *given)
            feed.after(state, count, made[0])
            return made

        return step


class PerNodeEngine:
    """Each node in a place of its own, balanced by cost; only what nodes put out travels.

    Args:
        task: what is trained.
        state: from `init_state`; its frozen nodes and shapes count, not its values.
        devices: over which the nodes are spread.
        placement: one of `PLACEMENTS`: each node on one device (`nodes`), on a group of them, over
            which its batch is split (`nodes+data`), or on all of them (`data`).

    Raises:
        InputError: a batch that is not divisible by the number of devices, with `data`.
    """

    name: str = "per_node"

    def __init__(
        self,
        task: Task,
        state: GraphState,
        devices: Sequence[jax.Device],
        placement: str = "nodes",
    ) -> None:
        self._task = task
        self.wants_to_stop: Callable[[], bool] = lambda: False
        share = task.batches.batch_size // task.accumulate
        if placement == "data":
            Parallel("jit", devices).check_batch_size(task.batches.batch_size, task.accumulate)
        shape = task.image_shape
        self.placement = node_placement(task.node_fns, state, devices, shape, share, placement)
        self._used = tuple(dict.fromkeys(self.placement))
        size = evaluation_batch_size(task.image_shape, devices[0].platform)
        self.evaluate = make_per_node_evaluator(
            task.node_fns, self.placement, size, task.derived.ensembles
        )
        used = dict.fromkeys(device for to in self._used for device in devices_of(to))
        how = "" if placement == "nodes" else f", {placement}"
        self.summary = f"{_devices(tuple(used))} (node by node{how})"

    def place(self, state: GraphState) -> GraphState:
        """Every node in its place."""
        return place(state, self.placement)

    def gathered(self, state: GraphState) -> GraphState:
        """The state as it is."""
        return state

    def load(self, arrays: Arrays) -> dict[Place, Arrays]:
        """A copy of the data in each place that has nodes, its images split over the devices."""
        return {to: _loaded(arrays, to) for to in self._used}

    def make_step(
        self,
        data: dict[Place, Arrays],
        edges: ArrayLike | EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        recordings: Recordings | None = None,
    ) -> Step:
        """The step of a training: see `Engine`. It makes one update a call."""
        task, placement = self._task, self.placement
        home, batch = placement[0], batch_maker(self._task, data, key)
        arrays = jax.device_put(jax.tree.map(jnp.asarray, edge_arrays(edges)), whole(home))
        if priors is not None:
            priors = [jax.device_put(p, whole(to)) for p, to in zip(priors, placement, strict=True)]
        feed = Feed(recordings, lambda tree: jax.device_put(tree, whole(home)))

        late = {
            delay: {placement[d.sender] for d in arrays.delayed if d.changes and d.delay == delay}
            for delay in delays_of(arrays)
        }

        def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
            del count  # always 1
            made = {to: batch(state.step, to) for to in self._used}
            _, labels, progress, image_index, mixed = made[home]
            rows = feed.rows(state, 1)
            updated, metrics = per_node_step(
                state,
                {to: images for to, (images, *_) in made.items()},
                labels,
                arrays,
                progress,
                placement=placement,
                priors=priors,
                recorded=_taken(feed.tables, image_index) | rows,
                mixed=mixed,
                ahead={
                    k: {to: batch(state.step, to, k)[0] for to in used} for k, used in late.items()
                },
                **task.options,
            )
            feed.after(state, 1, updated)
            return updated, metrics

        return step


def batch_maker(
    task: Task, data: dict[Place, Arrays], key: jax.Array
) -> Callable[..., tuple[Any, ...]]:
    """`batch(step, place, ahead=0)`: what a place needs of the batch of a step, or of a later one.

    Args:
        task: what is trained.
        data: in each place, as `PerNodeEngine.load` returns it.
        key: what batches are drawn by.

    Returns:
        A function that returns images, labels, the gates' progress, the images' positions, and what
        is mixed into each.
    """
    keys = {to: jax.device_put(key, whole(to)) for to in data}

    def batch(step: jax.Array, to: Place, ahead: int = 0) -> tuple[Any, ...]:
        position = jax.device_put(step + ahead if ahead else step, whole(to))
        given = data[to], keys[to], position, task.total_steps
        return _make_batch(*given, batches=task.batches, spread=spread_over(to))

    return batch


def _loaded(arrays: Arrays, to: Place) -> Arrays:
    """The data in a place."""
    spread = spread_over(to)
    if spread is None:
        return jax.device_put(Arrays(*map(jnp.asarray, arrays)), to)
    return arrays.spread_over(spread)


@functools.partial(jax.jit, static_argnames=("batches", "spread"))
def _make_batch(
    data: Arrays,
    key: jax.Array,
    step: jax.Array,
    total_steps: int,
    *,
    batches: Batches,
    spread: Parallel | None,
) -> tuple[Any, ...]:
    """Images and labels of the next step, the gates' progress, the images' positions, the mix."""
    plan = batches.plan(key, step)
    if spread is not None:
        plan = spread.shard(plan)
    images, labels = take_batch(*data, plan, None if spread is None else spread.rows)
    mixed = labels_of(*data, plan)[1]
    return images, labels, (step + 1) / total_steps, plan.image_index, mixed


_taken = jax.jit(taken)


def _devices(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"
