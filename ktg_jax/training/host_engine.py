"""Each process trains its own nodes; only what they put out travels between processes.

Nodes that are heard as they are now are waited for in every update. Where all that travels is heard
late, nobody waits but for what was said that many updates ago: codistillation (Anil et al., 2018).
Both are the training that one process simulates, to float rounding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.gates import CUTOFF
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.training import programs
from ktg_jax.training.accumulate import zeros_of
from ktg_jax.training.batches import Arrays
from ktg_jax.training.engines import PerNodeEngine, batch_maker
from ktg_jax.training.evaluation import Means, evaluation_batch_size, means_of
from ktg_jax.training.exchange import Exchange, Later, Mailbox
from ktg_jax.training.forward import node_forward
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.hosts import of_process
from ktg_jax.training.node_terms import Priors, absent
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_evaluation import batch_at, spread_over
from ktg_jax.training.placement import Place, node_costs, split, whole
from ktg_jax.training.recorded import Feed, Recordings, taken
from ktg_jax.training.shares import owners, shares_of_edges
from ktg_jax.training.state import GraphState
from ktg_jax.training.task import Step, Task
from ktg_jax.training.updates import optimizers_of


class HostNodesEngine:
    """The nodes spread over processes, and within each over its devices.

    All processes make it, and do all that it offers, at the same time.

    Args:
        task: what is trained.
        state: from `init_state`, of all nodes; its frozen nodes and shapes count, not its values.
        devices: those of all processes.
        placement: `nodes` or `nodes+data`, within each process.
    """

    name: str = "per_node"

    def __init__(
        self, task: Task, state: GraphState, devices: Sequence[jax.Device], placement: str
    ) -> None:
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.task, self.me = task, jax.process_index()
        self.processes = jax.process_count()
        self.shapes = jax.tree.map(_shape, state)
        costs = node_costs(task.node_fns, state, task.image_shape)
        self.owner = owners(costs, task.derived, self.processes)
        self.own = frozenset(i for i, process in enumerate(self.owner) if process == self.me)
        fns = [each if i in self.own else NO_NETWORK for i, each in enumerate(task.node_fns)]
        mine = [device for device in devices if device.process_index == self.me]
        local = dataclasses.replace(task, node_fns=fns)
        self._inner = PerNodeEngine(local, self._local(state), mine, placement)
        self.placement = self._inner.placement
        self._step: _HostStep | None = None
        size = evaluation_batch_size(task.image_shape, mine[0].platform)
        self._evaluation_size = -(-size // len(mine)) * len(mine)
        self.summary = f"{self.processes} processes, each with nodes of its own; of the first, "
        self.summary += self._inner.summary

    def _local(self, state: GraphState) -> GraphState:
        """This process's nodes; the others as if they were recorded."""
        own = [i in self.own for i in range(len(state.params))]

        def kept(trees: Sequence[Any], other: Any) -> tuple[Any, ...]:
            return tuple(tree if mine else other for tree, mine in zip(trees, own, strict=True))

        return GraphState(
            kept(state.params, {}),
            kept(state.model_state, {}),
            kept(state.opt_state, None),
            state.step,
            state.stale,
        )

    def place(self, state: GraphState) -> GraphState:
        """This process's nodes, each in its place; of the others nothing."""
        return self._inner.place(self._local(state))

    def gathered(self, state: GraphState) -> GraphState:
        """The state of all nodes on the host, of a state of this process's."""
        nodes = []
        stale = state.stale if self._step is None else self._step.all_said(state.stale)
        for i, owner in enumerate(self.owner):
            own = state.params[i], state.model_state[i], state.opt_state[i]
            shapes = (
                part[i]
                for part in (self.shapes.params, self.shapes.model_state, self.shapes.opt_state)
            )
            nodes.append(of_process(own, owner, tuple(shapes)))
        params, model_state, opt_state = zip(*nodes, strict=True)
        rest = jax.device_get((state.step, stale))
        return GraphState(tuple(params), tuple(model_state), tuple(opt_state), *rest)

    def load(self, arrays: Arrays) -> dict[Place, Arrays]:
        """The data in each place of this process that has nodes."""
        return self._inner.load(arrays)

    def make_step(
        self,
        data: dict[Place, Arrays],
        edges: ArrayLike | EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        recordings: Recordings | None = None,
    ) -> Step:
        """The step of a training: see `Engine`. It makes one update a call."""
        self._step = _HostStep(self, data, edge_arrays(edges), key, priors, recordings)
        return self._step

    def evaluate(self, state: GraphState, data: dict[Place, Arrays]) -> Means:
        """Every node's and the ensemble's means; each process evaluates its own nodes."""
        if self._step is not None:
            self._step.wait()  # or messages of updates would be on their way at the same time
        task, placement, size = self.task, self.placement, self._evaluation_size
        home, shapes = placement[0], self.output_shapes(size, with_stages=False)
        are_here = [
            [i for i, of in enumerate(self.owner) if of == p and shapes[i] is not None]
            for p in range(self.processes)
        ]
        exchange = Exchange([{i: shapes[i] for i in nodes} for nodes in are_here])
        sums = []
        for start in range(0, len(data[home].labels), size):
            made = {to: batch_at(data[to], start, size=size, spread=spread_over(to)) for to in data}
            own = {}
            for i in are_here[self.me]:
                forward = programs.frozen_forward(task.node_fns[i], False, cpu_convolution().name)
                own[i] = forward(state.params[i], state.model_state[i], made[placement[i]][0])
            said = {i: z for answer in exchange(own) for i, z in answer.items()}
            logits = tuple(
                None if i not in said else jax.device_put(said[i], whole(home))
                for i in range(len(shapes))
            )
            sums.append(programs.sums_of(logits, *made[home][1:], task.derived.ensembles))
        return means_of(sums)

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


class _HostStep:
    """An update of this process's nodes, in step with the other processes.

    Args:
        engine: whose step it is.
        data: of `load`.
        edges: of the whole graph.
        key: what batches are drawn by.
        priors: of all nodes, or None.
        recordings: of recorded nodes.
    """

    def __init__(
        self,
        engine: HostNodesEngine,
        data: dict[Place, Arrays],
        edges: EdgeArrays,
        key: jax.Array,
        priors: Priors | None,
        recordings: Recordings | None,
    ) -> None:
        self._engine, self._edges = engine, edges
        task, placement = engine.task, engine.placement
        self._home, self._number_of_nodes = placement[0], len(task.node_fns)
        are_networks = [fns != NO_NETWORK for fns in task.node_fns]
        given = engine.owner, edges, task.derived, are_networks, engine.processes
        self._shares = shares_of_edges(*given)
        self._batch = batch_maker(task, data, key)
        self._feed = Feed(recordings, lambda tree: jax.device_put(tree, whole(self._home)))
        self._options = self._local_options(priors)
        self._local_edges = jax.device_put(self._cut(), whole(self._home))
        self._blank = self._placeholders()
        self._now = Exchange(self._shapes_now())
        distances = _distances(priors, engine.shapes)
        late = Exchange(self._shapes_late(distances))
        self._mailbox = Mailbox(late, at_once=self._shares.waits)
        self._last: tuple[Any, int] | None = None

    def __call__(self, state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        """Makes an update; its metrics are on their way."""
        del count  # always 1
        number = self._number(state)
        lag = min((each.delay for each in self._edges.delayed if each.changes), default=_LAG)
        state = self._with_what_was_said(state, number - lag)
        said = self._say_ahead(state)
        updated, metrics = self._update(state)
        rows = programs.metrics_of_nodes(metrics, self._edges)
        message = {"said": said, "metrics": dict(rows), "stop": self._engine.wants_to_stop()}
        answers = self._mailbox.post(number, self._filled(message))
        self._last = updated.step, number + 1
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

    def _number(self, state: GraphState) -> int:
        if self._last is None or self._last[0] is not state.step:
            return int(jax.device_get(state.step))
        return self._last[1]

    # --- the update

    def _update(self, state: GraphState) -> tuple[GraphState, Metrics]:
        engine, home = self._engine, self._home
        made = {to: self._batch(state.step, to) for to in dict.fromkeys(engine.placement)}
        _, labels, progress, image_index, mixed = made[home]
        extra = len(self._edges.delayed)
        edges, stale = programs.open_and_hear(self._edges, state.stale, state.step)
        gates = programs.closed_alike(self._local_edges.gates, edges.gates, self._edges.gates)
        late = {
            self._number_of_nodes + d: self._blank[each.sender] if said is None else said
            for d, (each, said) in enumerate(zip(self._edges.delayed, stale, strict=True))
        }
        recorded = taken(self._feed.tables, image_index) | self._feed.rows(state, 1)
        remote = {i: blank for i, blank in self._blank.items() if i not in engine.own}
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
            placement=engine.placement + (home,) * extra,
            recorded=remote | recorded | late,
            mixed=mixed,
            meet=self._meet,
            **self._options,
        )
        self._feed.after(state, 1, updated)
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
        me = self._engine.me
        if self._shares.waits:
            answers = self._now({i: outputs[i] for i in self._shares.said_now[me]})
            for process, answer in enumerate(answers):
                for i, said in answer.items() if process != me else ():
                    outputs[i] = jax.device_put(said, split(self._home))
        for d, each in enumerate(self._edges.delayed, start=self._number_of_nodes):
            if not each.changes:
                outputs[d] = outputs[each.sender]
        return outputs

    def _say_ahead(self, state: GraphState) -> dict[int, Any]:
        """What this process's stale senders put out for the batches to come."""
        engine, said = self._engine, {}
        for d in self._shares.said_ahead[engine.me]:
            i, delay, _ = self._edges.delayed[d]
            images = self._batch(state.step, engine.placement[i], delay)[0]
            convolution = cpu_convolution().name
            fns, with_stages = engine.task.node_fns[i], self._edges.needs_stages
            forward = programs.frozen_forward(fns, with_stages, convolution)
            said[d] = forward(state.params[i], state.model_state[i], images)
        return said

    # --- what is said

    def _filled(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with all metrics that there are in any process."""
        shapes = self._late_metrics
        blank = {key: jnp.full(shape.shape, absent(), shape.dtype) for key, shape in shapes.items()}
        message["metrics"] = {key: message["metrics"].get(key, blank[key]) for key in blank}
        return message

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
        engine, extra = self._engine, len(self._edges.delayed)
        task = engine.task
        own = [i in engine.own for i in range(self._number_of_nodes)]
        fns = [f if mine else NO_NETWORK for f, mine in zip(task.node_fns, own, strict=True)]
        optimizers = optimizers_of(task.optimizer, len(own))
        known: list[Any] = [None] * len(own)
        for i, prior in enumerate(priors or ()):
            if prior is not None and own[i]:
                known[i] = jax.device_put(prior, whole(engine.placement[i]))
        averages = tuple(each for each in task.derived.averages if each.node in engine.own)
        return task.options | {
            "node_fns": (*fns, *[NO_NETWORK] * extra),
            "optimizer": (*optimizers, *[optimizers[0]] * extra),
            "derived": task.derived._replace(averages=averages),
            "priors": [*known, *[None] * extra] if any(p is not None for p in known) else None,
        }

    def _cut(self) -> EdgeArrays:
        """The edges with what other processes' nodes hear cut off."""
        gates = np.array(self._edges.gates)
        mine = [i in self._engine.own for i in range(self._number_of_nodes)]
        others = ~np.array([*mine, *[False] * len(self._edges.delayed)])
        gates[others] = CUTOFF if gates.ndim == 2 else 0
        connectors = tuple(c for c in self._edges.connectors if c.receiver in self._engine.own)
        return dataclasses.replace(self._edges, gates=gates, connectors=connectors, delayed=())

    def _placeholders(self) -> dict[int, Any]:
        """By node, zeros in place of what it puts out for a batch."""
        size = self._engine.task.batches.batch_size
        shapes = self._engine.output_shapes(size, self._edges.needs_stages)
        zeros = {i: zeros_of(each) for i, each in enumerate(shapes) if each is not None}
        return jax.device_put(zeros, split(self._home))

    def _shapes_now(self) -> list[Any]:
        task = self._engine.task
        size = task.batches.batch_size // task.accumulate
        shapes = self._engine.output_shapes(size, self._edges.needs_stages)
        return [{i: shapes[i] for i in nodes} for nodes in self._shares.said_now]

    def _shapes_late(self, distances: int) -> list[Any]:
        nodes = self._number_of_nodes
        shape = partial(jax.ShapeDtypeStruct, dtype=np.float32)
        self._late_metrics = {
            "loss": shape((nodes,)),
            "accuracy": shape((nodes,)),
            "edge_losses": shape((nodes, nodes)),
        }
        if distances:
            self._late_metrics["prior_distance"] = shape((nodes, distances))
        of_ring = [
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), ring)
            for ring in self._engine.shapes.stale
        ]
        return [
            {
                "said": {d: of_ring[d] for d in said},
                "metrics": self._late_metrics,
                "stop": shape(()),
            }
            for said in self._shares.said_ahead
        ]


_LAG = 16
"""For how many updates a process may be ahead of what the others say of theirs."""


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _distances(priors: Priors | None, shapes: GraphState) -> int:
    """How many distances the nodes' priors report, at most."""
    found = [0]
    for i, prior in enumerate(priors or ()):
        if prior is not None:
            params = shapes.params[i]
            made = jax.eval_shape(prior.add_to, params, params, jnp.float32(0))
            found.append(made[1].shape[0])
    return max(found)
