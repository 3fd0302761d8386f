"""Times what a teacher costs: `python -m benchmarks.recorded --help`.

A student alone, taught by live teachers, and by recordings of the same teachers; in one process, in
turns, on made-up images. Live and recorded must have the same losses.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import ktg_jax as ktg
from benchmarks import report
from benchmarks.machine import machine
from benchmarks.measure import check_same_losses, interleaved, spread
from benchmarks.task import LEARNING_RATE, SEED, Figures
from experiments.runs import cli
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table
from experiments.runs.options import at_least
from ktg_jax.training.batches import Arrays, data_key
from ktg_jax.training.engines import choose_engine
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.record import Network, record_batches
from ktg_jax.training.task import Step, Task

EXAMPLES = """Examples:
  python -m benchmarks.recorded
  python -m benchmarks.recorded --quick --json recorded.json
  python -m benchmarks.recorded --student resnet20 --teachers resnet110"""
_CLASSES = 10


@dataclass(frozen=True)
class RecordedOptions(report.Output):
    """Time a step with live teachers, with recorded ones, and of the student alone."""

    command: ClassVar = Command("benchmarks.recorded", examples=EXAMPLES)

    student: str = "resnet8"
    """The student's model."""
    teachers: tuple[str, ...] = ()
    """Models of each case's teachers, joined by +; else resnet56, and
    resnet56+resnet32+resnet20."""
    batch_size: int = 64
    """Images a step."""
    image_size: int = 32
    """Pixels a side."""
    steps: int | None = None
    """Steps of a turn; else 20."""
    rounds: int | None = None
    """Turns of each that count; else 15."""


def main() -> None:
    """Measures what the command line asks for."""
    measure(parse(RecordedOptions), report.console())


def measure(options: RecordedOptions, console: Console) -> dict[str, Any]:
    """Measures all cases, writes and prints the figures, and returns them.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: live and recorded teachers have other losses.
    """
    at_least(options, 1, "batch_size", "image_size", "steps", "rounds")
    report.check_output(options)
    report.models_of("student", options.student)
    given = options.teachers or (
        ("resnet8",) if options.quick else ("resnet56", "resnet56+resnet32+resnet20")
    )
    groups = [report.models_of("teachers", group) for group in given]
    content: dict[str, Any] = {"machine": machine(), "student": options.student, "cases": []}
    with report.progress(console, total=len(groups)) as begin:
        for group in groups:
            begin("+".join(group))
            content["cases"].append(_case(options, group))
            report.save(options, content)
    console.print(_table(options.student, content["cases"]))
    return content


def _case(options: RecordedOptions, teachers: Sequence[str]) -> Figures:
    """The seconds of a step: alone, with live and with recorded teachers."""
    steps = options.steps or (3 if options.quick else 20)
    rounds = options.rounds or (3 if options.quick else 15)
    with tempfile.TemporaryDirectory() as folder:
        arms = _arms(options, teachers, steps * (rounds + 2), Path(folder))
        firsts = {name: step(1) for name, step in arms.items()}
        check_same_losses({name: [firsts[name]] for name in ("live", "recorded")})
        turns = {name: partial(_timed, step, steps) for name, step in arms.items()}
        found = interleaved(turns, rounds, warm_up=1)
    times = {name: spread(values) for name, values in found.items()}
    entry: Figures = {"teachers": "+".join(teachers), "steps": steps, "rounds": rounds}
    for name, values in times.items():
        entry |= report.figures_of(name, values)
        entry[f"{name}_ratio"] = values.median / times["alone"].median
    return entry


def _timed(step: Callable[[int], float], steps: int) -> float:
    begin = time.perf_counter()
    step(steps)
    return (time.perf_counter() - begin) / steps


def _arms(
    options: RecordedOptions, teachers: Sequence[str], steps: int, folder: Path
) -> dict[str, Callable[[int], float]]:
    """For each arm a function that makes so many steps and returns the student's last loss."""
    rng, size = np.random.default_rng(SEED), options.image_size
    images = rng.integers(0, 256, (10 * options.batch_size, size, size, 3), np.uint8)
    labels = np.asarray(rng.integers(0, _CLASSES, len(images)), np.int32)
    batches = ktg.Batches(len(images), options.batch_size, max_offset=size // 8, flip=True)
    stream = ktg.BatchStream(images, labels, batches, SEED)

    def arm(graph: ktg.Graph, given: dict[int, ktg.Recording]) -> tuple[ktg.GraphState, Step]:
        fns = [
            ktg.NO_NETWORK if n.outputs else ktg.build_model(n.model, _CLASSES) for n in graph.nodes
        ]
        task = Task(fns, ktg.sgd(LEARNING_RATE), batches, images.shape[1:], steps)
        sample = jnp.zeros((1, *images.shape[1:]))
        state = ktg.init_state(graph, fns, task.optimizer, jax.random.key(SEED), sample)
        parallel = ktg.Parallel()
        name = choose_engine("auto", parallel)
        engine: Any = (
            FusedEngine(task, parallel)
            if name == "fused"
            else PerNodeEngine(task, state, parallel.devices)
        )
        data = engine.load(Arrays(images, labels))
        step = engine.make_step(data, graph.edge_arrays, data_key(SEED), None, given)
        return engine.place(state), step

    models = [options.student, *teachers]
    live = ktg.graphs.distillation(
        ktg.Node(options.student, name="student"),
        [ktg.Node(model, name=f"teacher{i}") for i, model in enumerate(teachers)],
    )
    recorded = ktg.graphs.distillation(
        ktg.Node(options.student, name="student"),
        [ktg.Node(name=f"teacher{i}", outputs=str(folder / str(i))) for i in range(len(teachers))],
    )
    live_state, live_step = arm(live, {})
    recordings = {}
    for i, model in enumerate(models[1:], start=1):
        fns = ktg.build_model(model, _CLASSES)
        network = Network(fns, live_state.params[i], live_state.model_state[i])
        header = ktg.Header("batches", stream.facts, rows=steps + 1, classes=_CLASSES)
        with ktg.RecordingWriter(folder / str(i - 1), header) as writer:
            for logits in record_batches(network, stream, range(steps + 1)):
                writer.add(logits)
        recordings[i] = ktg.Recording(folder / str(i - 1))
    alone = ktg.Graph([ktg.Node(options.student, name="student")], [["through"]])
    return {
        "alone": _stepping(*arm(alone, {})),
        "live": _stepping(live_state, live_step),
        "recorded": _stepping(*arm(recorded, recordings)),
    }


def _stepping(state: ktg.GraphState, step: Step) -> Callable[[int], float]:
    def go(count: int) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = step(state, 1)
        return float(jax.device_get(metrics["loss"])[0])

    return go


def _table(student: str, cases: Sequence[Figures]) -> Table:
    table = Table(title=f"A step of {student}, s (ratio: to it alone)")
    table.add_column("teachers")
    for title in ("alone", "recorded", "ratio", "live", "ratio"):
        table.add_column(title, justify="right")
    for case in cases:
        cells = [f"{case['alone_s']:.4f}"]
        for name in ("recorded", "live"):
            cells += [f"{case[f'{name}_s']:.4f}", f"{case[f'{name}_ratio']:.2f}"]
        table.add_row(report.short(case["teachers"]), *cells)
    return table


if __name__ == "__main__":
    cli.run(
        main, interrupted="interrupted; finished cases are in the file of --json, if one was given"
    )
