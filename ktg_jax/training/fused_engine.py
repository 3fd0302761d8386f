"""The whole graph in one compiled program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.errors import InputError
from ktg_jax.training.batches import Arrays, labels_of, take_batch
from ktg_jax.training.delays import delays_of
from ktg_jax.training.evaluation import (
    evaluation_batch_size,
    make_evaluator,
)
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.recorded import Feed, Recordings, Rows, taken
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import train_step
from ktg_jax.training.task import Step, Task, named


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
        edges = edge_arrays(edges)
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
        self.summary = f"{named(parallel.devices)} ({how})"

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
