"""Node by node, each in its place: the pieces of the step with one executable a model."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays, Batches, labels_of, take_batch
from ktg_jax.training.counter import Counter
from ktg_jax.training.delays import delays_of
from ktg_jax.training.evaluation import evaluation_batch_size
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_evaluation import make_per_node_evaluator, spread_over
from ktg_jax.training.placement import Place, devices_of, node_placement, place, split, whole
from ktg_jax.training.recorded import Feed, Recordings
from ktg_jax.training.state import GraphState
from ktg_jax.training.streaming import TrainingFeed
from ktg_jax.training.task import Step, Task, named


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
        self.summary = f"{named(tuple(used))} (node by node{how})"

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
        home, counter = placement[0], Counter()
        arrays = jax.device_put(jax.tree.map(jnp.asarray, edge_arrays(edges)), whole(home))
        if priors is not None:
            priors = [jax.device_put(p, whole(to)) for p, to in zip(priors, placement, strict=True)]
        feed = Feed(recordings, lambda tree: jax.device_put(tree, whole(home)))
        batches_of = batch_maker(task, data, key, delays_of(arrays))
        late = {
            delay: {placement[d.sender] for d in arrays.delayed if d.changes and d.delay == delay}
            for delay in delays_of(arrays)
        }

        def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
            del count  # always 1
            number = counter.number(state)
            batch = batches_of(state, number)
            made = {to: batch(to) for to in self._used}
            _, labels, progress, image_index, mixed = made[home]
            rows = feed.rows(number, 1)
            updated, metrics = per_node_step(
                state,
                {to: images for to, (images, *_) in made.items()},
                labels,
                arrays,
                progress,
                placement=placement,
                priors=priors,
                recorded=programs.rows_of_images(feed.tables, image_index) | rows,
                mixed=mixed,
                ahead={k: {to: batch(to, k)[0] for to in used} for k, used in late.items()},
                **task.options,
            )
            counter.note(updated, number + 1)
            return updated, metrics

        return step


def batch_maker(
    task: Task,
    data: dict[Place, Arrays],
    key: jax.Array,
    delays: Iterable[int],
) -> Callable[[GraphState, int], Callable[..., tuple[Any, ...]]]:
    """`batches(state, number)(place, ahead=0)`: what a place needs of the next batch, or of later.

    Args:
        task: what is trained.
        data: in each place, as `PerNodeEngine.load` returns it.
        key: what batches are drawn by.
        delays: how many updates ahead batches will be asked for, too.

    Returns:
        A function that is given a state and the number of its updates, and returns another, which
        returns images, labels, the gates' progress, the images' positions, and what is mixed into
        each.
    """
    keys = {to: jax.device_put(key, whole(to)) for to in data}
    first, stream = next(iter(data.values())), None
    if first.is_streamed:
        how = task.batches, key, task.total_steps
        stream = TrainingFeed(first.images, *how, delays=delays)

    def batches(state: GraphState, number: int) -> Callable[..., tuple[Any, ...]]:
        views = None if stream is None else stream.views(number)

        def batch(to: Place, ahead: int = 0) -> tuple[Any, ...]:
            position = jax.device_put(state.step + ahead if ahead else state.step, whole(to))
            here = data[to]
            if views is not None:
                here = here._replace(images=jax.device_put(views[ahead], split(to)))
            given = here, keys[to], position, task.total_steps
            return _make_batch(*given, batches=task.batches, spread=spread_over(to))

        return batch

    return batches


def _loaded(arrays: Arrays, to: Place) -> Arrays:
    """The data in a place; streamed images stay where they are."""
    spread = spread_over(to)
    if spread is not None:
        return arrays.spread_over(spread)
    labels = jax.device_put(jnp.asarray(arrays.labels), to)
    if arrays.is_streamed:
        return Arrays(arrays.images, labels)
    return Arrays(jax.device_put(jnp.asarray(arrays.images), to), labels)


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
