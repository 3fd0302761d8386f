"""The whole graph in one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.errors import InputError
from ktg_jax.training.batches import Arrays, BatchPlan, labels_of, take_batch
from ktg_jax.training.counter import Counter
from ktg_jax.training.delays import delays_of
from ktg_jax.training.evaluation import evaluation_batch_size, make_evaluator
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.recorded import Feed, Recordings, taken
from ktg_jax.training.state import GraphState
from ktg_jax.training.step import train_step
from ktg_jax.training.streaming import TrainingFeed
from ktg_jax.training.task import Step, Task, named


def fused_step(
    task: Task, parallel: Parallel, steps_per_call: int = 1, *, batched: bool = False
) -> Callable[..., tuple[GraphState, Metrics]]:
    """Compiles `step(state, *inputs)`, the inputs being the fields of `Inputs`.

    It makes its own batch, and returns a state and metrics.

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

    def step(state: GraphState, *given: Any) -> tuple[GraphState, Metrics]:
        inputs = Inputs(*given)
        edges = edge_arrays(inputs.edges)

        def batch(delay: int) -> tuple[BatchPlan, Any]:
            """The plan of the batch so many updates ahead, and where its images are."""
            plan = parallel.shard(task.batches.plan(inputs.key, state.step + delay))
            if inputs.views is None:
                return plan, inputs.data.images
            views = inputs.views[delay]
            return plan, views if parallel.spreads_data else parallel.shard(views)

        (plan, images), labels = batch(0), inputs.data.labels
        ahead = {}
        for delay in delays_of(edges):
            later, seen = batch(delay)
            ahead[delay] = take_batch(seen, labels, later, find)[0]
        recorded = taken(inputs.tables or {}, plan.image_index)
        updated, metrics = train_step(
            state,
            *take_batch(images, labels, plan, find),
            edges,
            (state.step + 1) / task.total_steps,
            axis_name=parallel.axis_name,
            priors=inputs.priors,
            recorded=recorded | parallel.shard(inputs.rows or {}),
            mixed=labels_of(images, labels, plan)[1],
            batched=batched,
            ahead=ahead,
            **task.options,
        )
        wishes = inputs.wishes
        return updated, metrics | ({} if wishes is None else {"stop": parallel.any_of(wishes)})

    def steps(state: GraphState, *given: Any) -> tuple[GraphState, Metrics]:
        inputs = Inputs(*given)
        views = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs.views)
        # Unrolled on CPUs, where XLA runs the body of a loop several times slower.
        unroll = parallel.devices[0].platform == "cpu"
        return jax.lax.scan(
            lambda state, each: step(state, *inputs._replace(rows=each[0], views=each[1])),
            state,
            (inputs.rows, views),
            length=steps_per_call,
            unroll=unroll,
        )

    spread = Arrays(images=parallel.spreads_data, labels=False)
    are_spread = Inputs(spread, False, False, False, False, False, views=True, wishes=True)
    return parallel.compile(step if steps_per_call == 1 else steps, are_spread)


class Inputs(NamedTuple):
    """What a compiled step takes beside the state.

    Attributes:
        data: images and labels; of streamed images the labels alone.
        edges: as of `train_step`.
        key: as of `Engine.make_step`.
        priors: as of `train_step`.
        tables: as of a `Feed`.
        rows: likewise.
        views: of streamed images those of the batch, by how many updates ahead it is; with several
            updates a call `[B, count, H, W, C]`.
        wishes: bool `[number of devices]`, split over them: whose process wants to stop. The metric
            `stop` is whether any does.
    """

    data: Arrays
    edges: Any
    key: Any
    priors: Any = None
    tables: Any = None
    rows: Any = None
    views: Any = None
    wishes: Any = None


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
        self._task, self._parallel = task, parallel
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
        parallel, counter = self._parallel, Counter()
        arrays = jax.tree.map(jnp.asarray, edge_arrays(edges))
        inputs = Inputs(data.on_device, *parallel.replicate((arrays, key, priors)))
        feed = Feed(recordings, parallel.replicate)
        size, stream = self._task.batches.batch_size, None
        if data.is_streamed:
            how = self._task.batches, key, self._task.total_steps
            rows = parallel.own_rows(size)
            stream = TrainingFeed(data.images, *how, rows, delays_of(arrays))

        def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
            number = counter.number(state)
            given = inputs._replace(tables=feed.tables, rows=feed.rows(number, count))
            if stream is not None:
                views = stream.views(number, count)
                placed = jax.tree.map(lambda own: parallel.split_batch(own, size), views)
                given = given._replace(views=placed)
            if parallel.spans_processes:
                given = given._replace(wishes=parallel.one_each(self.wants_to_stop()))
            made = self._compiled(count)(state, *given)
            counter.note(made[0], number + count)
            return made

        return step
