"""Each process trains its own nodes; only what they put out travels between processes.

Nodes that are heard as they are now are waited for in every update. Where all that travels is heard
late, nobody waits but for what was said that many updates ago: codistillation (Anil et al., 2018).
Both are the training that one process simulates, to float rounding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.edge_arrays import EdgeArrays, edge_arrays
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays
from ktg_jax.training.evaluation import Means, evaluation_batch_size, means_of
from ktg_jax.training.exchange import Exchange
from ktg_jax.training.host_step import HostNodes, HostStep
from ktg_jax.training.hosts import of_process
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.per_node_evaluation import batches_in_places
from ktg_jax.training.placement import Place, node_costs, whole
from ktg_jax.training.recorded import Recordings
from ktg_jax.training.shares import owners
from ktg_jax.training.state import GraphState
from ktg_jax.training.task import Step, Task


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
        me, processes = jax.process_index(), jax.process_count()
        costs = node_costs(task.node_fns, state, task.image_shape)
        self._owner = owners(costs, task.derived, processes)
        is_mine = [process == me for process in self._owner]
        fns = [f if mine else NO_NETWORK for f, mine in zip(task.node_fns, is_mine, strict=True)]
        mine = [device for device in devices if device.process_index == me]
        local = dataclasses.replace(task, node_fns=fns)
        self._is_mine = is_mine
        self._inner = PerNodeEngine(local, self._local(state), mine, placement)
        shapes = jax.tree.map(_shape, state)
        where = self._inner.placement
        self._nodes = HostNodes(task, shapes, self._owner, where, me, processes)
        self._step: HostStep | None = None
        size = evaluation_batch_size(task.image_shape, mine[0].platform)
        size = -(-size // len(mine)) * len(mine)
        self._batches = batches_in_places(size, tuple(dict.fromkeys(where)))
        self._evaluated = self._nodes.output_shapes(size, with_stages=False)
        self.summary = f"{processes} processes, each with nodes of its own; of the first, "
        self.summary += self._inner.summary

    def _local(self, state: GraphState) -> GraphState:
        """This process's nodes; the others as if they were recorded."""

        def kept(trees: Sequence[Any], other: Any) -> tuple[Any, ...]:
            both = zip(trees, self._is_mine, strict=True)
            return tuple(tree if mine else other for tree, mine in both)

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
        for i, owner in enumerate(self._owner):
            own, shapes = (
                (each.params[i], each.model_state[i], each.opt_state[i])
                for each in (state, self._nodes.shapes)
            )
            nodes.append(of_process(own, owner, shapes))
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
        given = data, edge_arrays(edges), key, priors, recordings
        self._step = HostStep(self._nodes, lambda: self.wants_to_stop(), *given)
        return self._step

    def evaluate(self, state: GraphState, data: dict[Place, Arrays]) -> Means:
        """Every node's and the ensemble's means; each process evaluates its own nodes."""
        if self._step is not None:
            self._step.wait()  # or messages of updates would be on their way at the same time
        nodes = self._nodes
        task, placement = nodes.task, nodes.placement
        home, shapes = placement[0], self._evaluated
        are_here = [
            [i for i, of in enumerate(self._owner) if of == p and shapes[i] is not None]
            for p in range(nodes.processes)
        ]
        exchange = Exchange([{i: shapes[i] for i in nodes} for nodes in are_here])
        sums = []
        for made in self._batches(data):
            own = {}
            for i in are_here[nodes.me]:
                forward = programs.frozen_forward(task.node_fns[i], False, cpu_convolution().name)
                own[i] = forward(state.params[i], state.model_state[i], made[placement[i]][0])
            said = {i: z for answer in exchange(own) for i, z in answer.items()}
            logits = tuple(
                None if i not in said else jax.device_put(said[i], whole(home))
                for i in range(len(shapes))
            )
            sums.append(programs.sums_of(logits, *made[home][1:], task.derived.ensembles))
        return means_of(sums)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
