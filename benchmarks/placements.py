"""What each device computes and holds, by placement: `python -m benchmarks.placements`.

Nothing is timed: the compiler counts the operations and the memory of a training step of several
`resnet8` that learn mutually, on simulated devices. The busiest device counts.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ktg_jax as ktg
from experiments.runs.console import Table, make_console
from ktg_jax.cpu.convolution import formulation
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays, Batches, data_key
from ktg_jax.training.fused_engine import fused_step
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.placement import (
    PLACEMENTS,
    Place,
    devices_of,
    node_placement,
    place,
    split,
    whole,
)
from ktg_jax.training.task import Task

MODEL, CLASSES, IMAGE = "resnet8", 100, (32, 32, 3)
MIB = 2**20


@dataclass(frozen=True)
class Load:
    """What the busiest device has of a step.

    Attributes:
        gflop: billions of floating point operations.
        state_mib: parameters, statistics and optimiser states, MiB.
        work_mib: what is kept between the passes and within them, MiB.
        nodes: how many nodes it holds.
    """

    gflop: float
    state_mib: float
    work_mib: float
    nodes: int


def main() -> None:
    """Prints the table that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placements", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows = []
    for nodes in options.nodes:
        for devices in options.devices:
            for placement in PLACEMENTS:
                load = load_of(placement, nodes, devices, options.batch_size)
                where = {"nodes": nodes, "devices": devices, "placement": placement}
                rows.append(where | {f"busiest_{k}": v for k, v in asdict(load).items()})
    show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def load_of(how: str, nodes: int, devices: int, batch_size: int) -> Load:
    """The load of the busiest device."""
    with formulation("xla"):  # whose operations the compiler knows
        graph = ktg.graphs.mutual([MODEL] * nodes)
        fns, optimizer = [ktg.build_model(MODEL, CLASSES)] * nodes, ktg.sgd(0.1)
        batches = Batches(batch_size, batch_size)
        task = Task(fns, optimizer, batches, IMAGE, 1)
        sample = jnp.zeros((1, *IMAGE))
        state = ktg.init_state(graph, fns, optimizer, jax.random.key(0), sample)
        used = jax.devices()[:devices]
        if how == "data":
            return _in_one_program(task, graph, state, Parallel("jit", used))
        placement = node_placement(fns, state, used, IMAGE, batch_size, how)
        return _node_by_node(task, state, placement)


def _in_one_program(
    task: Task, graph: ktg.Graph, state: ktg.GraphState, parallel: Parallel
) -> Load:
    size = task.batches.batch_size
    data = Arrays(jnp.zeros((size, *IMAGE), jnp.uint8), jnp.zeros(size, jnp.int32))
    edges = jax.tree.map(jnp.asarray, graph.edge_arrays)
    inputs = data.spread_over(parallel), *parallel.replicate((edges, data_key(0)))
    step: Any = fused_step(task, parallel)
    compiled = step.lower(parallel.replicate(state), *inputs).compile()
    work = compiled.memory_analysis().temp_size_in_bytes
    return Load(_flops(compiled) / 1e9, _size(state) / MIB, work / MIB, len(graph.nodes))


def _node_by_node(task: Task, state: ktg.GraphState, placement: tuple[Place, ...]) -> Load:
    loads: dict[jax.Device, list[Load]] = defaultdict(list)
    placed = place(state, placement)
    for i, to in enumerate(placement):
        of_node = placed.params[i], placed.model_state[i], placed.opt_state[i]
        flops, work = _programs_of(task, i, to, of_node)
        for device in devices_of(to):
            loads[device].append(Load(flops / 1e9, _size(of_node) / MIB, work / MIB, 1))
    totals = [
        Load(*(sum(each) for each in zip(*(asdict(load).values() for load in of), strict=True)))
        for of in loads.values()
    ]
    return Load(*(max(each) for each in zip(*(asdict(t).values() for t in totals), strict=True)))


def _programs_of(task: Task, i: int, to: Place, of_node: tuple[Any, ...]) -> tuple[float, float]:
    """The operations of a node's two programs on one device, and the bytes that they need there."""
    params, model_state, opt_state = of_node
    images = jax.device_put(jnp.zeros((task.batches.batch_size, *IMAGE)), split(to))
    forward: Any = programs.forward_with_pullback(task.node_fns[i], False, "xla", task.remat)
    logits, pullback, _ = forward(params, model_state, images)
    gradient = jax.device_put(jnp.zeros_like(logits), split(to))
    loss = jax.device_put(jnp.zeros(()), whole(to))
    update: Any = programs.backward_and_update(ktg.sgd(0.1))
    both = [
        forward.lower(params, model_state, images).compile(),
        update.lower(pullback, (gradient, {}), params, opt_state, loss).compile(),
    ]
    within = max(each.memory_analysis().temp_size_in_bytes for each in both)
    between = both[0].memory_analysis().output_size_in_bytes
    return sum(map(_flops, both)), within + between


def _flops(compiled: Any) -> float:
    return float((compiled.cost_analysis() or {}).get("flops", 0.0))


def _size(tree: Any) -> float:
    return float(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table("nodes", "devices", "placement", "GFLOP", "state, MiB", "work, MiB", "its nodes")
    for row in rows:
        where = [str(row[key]) for key in ("nodes", "devices", "placement")]
        figures = [f"{row[f'busiest_{key}']:.2f}" for key in ("gflop", "state_mib", "work_mib")]
        table.add_row(*where, *figures, str(row["busiest_nodes"]))
    make_console(width=100).print(table)


if __name__ == "__main__":
    main()
