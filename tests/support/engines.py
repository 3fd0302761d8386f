"""The engines that a training may run on, for tests that all of them train alike."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

import ktg_jax as ktg
from ktg_jax import GraphState, Parallel
from ktg_jax.training.batches import Arrays, data_key
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.task import Engine, Task

How: TypeAlias = Callable[[Task, GraphState], tuple[Engine, int]]
"""Makes an engine, and says how many updates its step makes in a call."""


def fused(steps: int = 1, batched: bool = False, **parallel: Any) -> How:
    return lambda task, state: (FusedEngine(task, Parallel(**parallel), batched=batched), steps)


def per_node(task: Task, state: GraphState) -> tuple[Engine, int]:
    return PerNodeEngine(task, state, jax.local_devices()), 1


def trained(
    how: How, task: Task, graph: ktg.Graph, state: GraphState, data: Arrays, steps: int = 4
) -> tuple[GraphState, Any]:
    """The state after so many updates, on the host, and its means over the data."""
    engine, count = how(task, state)
    loaded, state = engine.load(data), engine.place(state)
    step = engine.make_step(loaded, graph.edge_arrays, data_key(0))
    for _ in range(0, steps, count):
        state, _ = step(state, count)
    return jax.device_get(state), engine.evaluate(state, loaded)
