"""An update of one process's nodes, in step with the other processes."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.gates import CUTOFF
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.training import programs
from ktg_jax.training.accumulate import zeros_of
from ktg_jax.training.batches import Arrays
from ktg_jax.training.counter import Counter
from ktg_jax.training.delays import delays_of
from ktg_jax.training.exchange import Exchange, Later, Mailbox
from ktg_jax.training.forward import node_forward
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors, absent
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_engine import batch_maker
from ktg_jax.training.placement import Place, Placement, split, whole
from ktg_jax.training.recorded import Feed, Recordings, Rows
from ktg_jax.training.shares import shares_of_edges
from ktg_jax.training.state import GraphState
from ktg_jax.training.task import Task
from ktg_jax.training.updates import optimizers_of

_LAG = 16
"""For how many updates a process may be ahead of what the others say of theirs."""


@dataclass(frozen=True)
class HostNodes:
    """The nodes of a graph, and who has which.

    Attributes:
        task: what is trained, of all nodes.
        shapes: the state of all nodes, as shapes and dtypes.
        owner: the process of each node.
        placement: of each node its place, as far as it is this process's.
        me: this process.
        processes: how many there are.
    """

    task: Task
    shapes: GraphState
    owner: tuple[int, ...]
    placement: Placement
    me: int
    processes: int

    @property
    def own(self) -> frozenset[int]:
        """This process's nodes."""
        return frozenset(i for i, process in enumerate(self.owner) if process == self.me)

    def output_shapes(self, batch: int, with_stages: bool) -> list[Any]:
        """What each node puts out for so many images; None: it has no network."""
        images = jax.ShapeDtypeStruct((batch, *self.task.image_shape), jnp.float32)

        def shape(i: int) -> Any:
            fns = self.task.node_fns[i]
            if fns == NO_NETWORK:
                return None
            forward = partial(node_forward, fns=fns, frozen=True, with_stages=with_stages)
            given = self.shapes.params[i], self.shapes.model_state[i], images
            return jax.eval_shape(lambda *inputs: forward(*inputs)[0], *given)

        return [shape(i) for i in range(len(self.task.node_fns))]


class HostStep:
    """An update of this process's nodes, in step with the other processes.

    Args:
        nodes: the nodes, and who has which.
        wants_to_stop: asked in each update.
        data: of `PerNodeEngine.load`.
        edges: of the whole graph.
        key: what batches are drawn by.
        priors: of all nodes, or None.
        recordings: of recorded nodes.
    """

    def __init__(
        self,
        nodes: HostNodes,
        wants_to_stop: Callable[[], bool],
        data: dict[Place, Arrays],
        edges: EdgeArrays,
        key: jax.Array,
        priors: Priors | None,
        recordings: Recordings | None,
    ) -> None:
        self._nodes, self._edges, self._wants_to_stop = nodes, edges, wants_to_stop
        task, placement = nodes.task, nodes.placement
        self._home, self._number_of_nodes = placement[0], len(task.node_fns)
        are_networks = [fns != NO_NETWORK for fns in task.node_fns]
        given = nodes.owner, edges, task.derived, are_networks, nodes.processes
        self._shares = shares_of_edges(*given)
        self._counter = Counter()
        self._batches = batch_maker(task, data, key, delays_of(edges))
        self._feed = Feed(recordings, partial(jax.device_put, device=whole(self._home)))
        self._options = self._local_options(priors)
        self._local_edges = jax.device_put(self._cut(), whole(self._home))
        size, with_stages = task.batches.batch_size, edges.needs_stages
        shapes = nodes.output_shapes(size, with_stages)
        blank = {i: zeros_of(each) for i, each in enumerate(shapes) if each is not None}
        self._blank = jax.device_put(blank, split(self._home))
        shapes = nodes.output_shapes(size // task.accumulate, with_stages)
        self._now = Exchange([{i: shapes[i] for i in said} for said in self._shares.said_now])
        distances = _distances(priors, nodes.shapes)
        late = Exchange(self._shapes_late(distances))
        self._no_metrics = {
            key: np.full(shape.shape, absent(), np.float32)
            for key, shape in self._late_metrics.items()
        }
        self._mailbox = Mailbox(late, at_once=self._shares.waits)

    def __call__(self, state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        """Makes an update; its metrics are on their way."""
        del count  # always 1
        number = self._counter.number(state)
        batch = self._batches(state, number)
        lag = min((each.delay for each in self._edges.delayed if each.changes), default=_LAG)
        state = self._with_what_was_said(state, number - lag)
        said = self._say_ahead(state, batch)
        updated, metrics = self._update(state, batch, self._feed.rows(number, 1))
        rows = programs.metrics_of_nodes(metrics, self._edges)
        message = {
            "said": said,
            "metrics": {key: rows.get(key, none) for key, none in self._no_metrics.items()},
            "stop": self._wants_to_stop(),
        }
        answers = self._mailbox.post(number, message)
        self._counter.note(updated, number + 1)
        return updated, self._merged(answers)

    def wait(self) -> None:
        """Waits until nothing is on its way."""
        self._mailbox.wait()

    def all_said(self, stale: Sequence[Any]) -> tuple[Any, ...]:
        """A state's `stale` on the host, with all that was said; the state stays as it is."""
        found = jax.tree.map(np.array, tuple(stale))
        for number, answers in self._mailbox.wait():
            for d, said in (each for answer in answers for each in answer["said"].items()):

                def put(ring: np.ndarray, new: np.ndarray, number: int = number) -> None:
                    ring[number % len(ring)] = new

                jax.tree.map(put, found[d], said)
        return found

    def _with_what_was_said(self, state: GraphState, up_to: int) -> GraphState:
        """The state with what stale senders said in the updates up to a number."""
        stale = list(state.stale)
        for number, answers in self._mailbox.arrived(up_to):
            for answer in answers:
                for d, said in answer["said"].items():
                    new = jax.device_put(said, whole(self._home))
                    stale[d] = programs.push(stale[d], new, number)
        return dataclasses.replace(state, stale=tuple(stale))

    # --- the update

    def _update(
        self, state: GraphState, batch: Callable[..., tuple[Any, ...]], rows: Rows
    ) -> tuple[GraphState, Metrics]:
        home = self._home
        made = {to: batch(to) for to in dict.fromkeys(self._nodes.placement)}
        _, labels, progress, image_index, mixed = made[home]
        extra = len(self._edges.delayed)
        edges, stale = programs.open_and_hear(self._edges, state.stale, state.step)
        gates = programs.closed_alike(self._local_edges.gates, edges.gates, self._edges.gates)
        recorded = programs.rows_of_images(self._feed.tables, image_index) | rows
        filled_in = self._blank | recorded  # by `_meet`, where a sender never changes
        late = {
            self._number_of_nodes + d: filled_in[each.sender] if said is None else said
            for d, (each, said) in enumerate(zip(self._edges.delayed, stale, strict=True))
        }
        remote = {i: blank for i, blank in self._blank.items() if i not in self._nodes.own}
        whole_state = GraphState(
            state.params + ({},) * extra,
            state.model_state + ({},) * extra,
            state.opt_state + (None,) * extra,
            state.step,
        )
        updated, metrics = per_node_step(
            whole_state,
            {to: images for to, (images, *_) in made.items()},
            labels,
            dataclasses.replace(self._local_edges, gates=gates),
            progress,
            placement=self._nodes.placement + (home,) * extra,
            recorded=remote | recorded | late,
            mixed=mixed,
            meet=self._meet,
            **self._options,
        )
        own = slice(self._number_of_nodes)
        return (
            GraphState(
                updated.params[own],
                updated.model_state[own],
                updated.opt_state[own],
                updated.step,
                state.stale,
            ),
            metrics,
        )

    def _meet(self, outputs: list[Any]) -> list[Any]:
        """What all nodes put out, that of other processes filled in where somebody hears it."""
        me = self._nodes.me
        if self._shares.waits:
            answers = self._now({i: outputs[i] for i in self._shares.said_now[me]})
            for process, answer in enumerate(answers):
                for i, said in answer.items() if process != me else ():
                    outputs[i] = jax.device_put(said, split(self._home))
        for d, each in enumerate(self._edges.delayed, start=self._number_of_nodes):
            if not each.changes:
                outputs[d] = outputs[each.sender]
        return outputs

    def _say_ahead(
        self, state: GraphState, batch: Callable[..., tuple[Any, ...]]
    ) -> dict[int, Any]:
        """What this process's stale senders put out for the batches to come."""
        said: dict[int, Any] = {}
        for d in self._shares.said_ahead[self._nodes.me]:
            i, delay, _ = self._edges.delayed[d]
            images = batch(self._nodes.placement[i], delay)[0]
            convolution = cpu_convolution().name
            fns, with_stages = self._nodes.task.node_fns[i], self._edges.needs_stages
            forward = programs.frozen_forward(fns, with_stages, convolution)
            said[d] = forward(state.params[i], state.model_state[i], images)
        return said

    # --- what is said

    def _merged(self, answers: "Future[list[Any]]") -> Metrics:
        """Each node's metrics as its own process has them."""

        def rows(key: str, messages: list[Any]) -> np.ndarray:
            found = np.stack(
                [messages[owner]["metrics"][key][i] for i, owner in enumerate(self._shares.owner)]
            )
            if key == "accuracy":
                found = np.where(self._shares.known, found, np.float32(absent()))
            return found

        merged: dict[str, Any] = {
            key: Later(answers, partial(rows, key)) for key in self._late_metrics
        }
        merged["stop"] = Later(answers, lambda messages: any(each["stop"] > 0 for each in messages))
        return merged

    # --- made once

    def _local_options(self, priors: Priors | None) -> dict[str, Any]:
        """The options of `per_node_step` for this process's nodes, stale senders behind them."""
        extra, task = len(self._edges.delayed), self._nodes.task
        own = [i in self._nodes.own for i in range(self._number_of_nodes)]
        fns = [f if mine else NO_NETWORK for f, mine in zip(task.node_fns, own, strict=True)]
        optimizers = optimizers_of(task.optimizer, len(own))
        known: list[Any] = [None] * len(own)
        for i, prior in enumerate(priors or ()):
            if prior is not None and own[i]:
                known[i] = jax.device_put(prior, whole(self._nodes.placement[i]))
        averages = tuple(each for each in task.derived.averages if each.node in self._nodes.own)
        return task.options | {
            "node_fns": (*fns, *[NO_NETWORK] * extra),
            "optimizer": (*optimizers, *[optimizers[0]] * extra),
            "derived": task.derived._replace(averages=averages),
            "priors": [*known, *[None] * extra] if any(p is not None for p in known) else None,
        }

    def _cut(self) -> EdgeArrays:
        """The edges with what other processes' nodes hear cut off."""
        gates = np.array(self._edges.gates)
        mine = [i in self._nodes.own for i in range(self._number_of_nodes)]
        others = ~np.array([*mine, *[False] * len(self._edges.delayed)])
        gates[others] = CUTOFF if gates.ndim == 2 else 0
        connectors = tuple(c for c in self._edges.connectors if c.receiver in self._nodes.own)
        return dataclasses.replace(self._edges, gates=gates, connectors=connectors, delayed=())

    def _shapes_late(self, distances: int) -> list[Any]:
        number = self._number_of_nodes
        shape = partial(jax.ShapeDtypeStruct, dtype=np.float32)
        self._late_metrics = {
            "loss": shape((number,)),
            "accuracy": shape((number,)),
            "edge_losses": shape((number, number)),
        }
        if distances:
            self._late_metrics["prior_distance"] = shape((number, distances))
        of_ring = [
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), ring)
            for ring in self._nodes.shapes.stale
        ]
        return [
            {
                "said": {d: of_ring[d] for d in said},
                "metrics": self._late_metrics,
                "stop": shape(()),
            }
            for said in self._shares.said_ahead
        ]


def _distances(priors: Priors | None, shapes: GraphState) -> int:
    """How many distances the nodes' priors report, at most."""
    found = [0]
    for i, prior in enumerate(priors or ()):
        if prior is not None:
            params = shapes.params[i]
            made = jax.eval_shape(prior.add_to, params, params, jnp.float32(0))
            found.append(made[1].shape[0])
    return max(found)
