"""Times compilation: `python -m benchmarks.compile --help`.

Each start is a fresh process that finds nothing compiled: it traces, compiles and makes the first
step of a graph of three models, or of seven nodes of the same three models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, ClassVar

from rich.console import Console

from benchmarks import report
from benchmarks.machine import machine
from benchmarks.measure import Worker, interleaved, spread
from benchmarks.task import OURS, Figures, Task, Unavailable
from experiments.runs import cli
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table
from ktg_jax.errors import InputError

MODELS = "resnet32+resnet110+wrn28_2"
QUICK_MODELS = "resnet8+resnet14+wrn10_2"
SIZES = (3, 7)
EXAMPLES = """Examples:
  python -m benchmarks.compile
  python -m benchmarks.compile --quick --json compile.json
  python -m benchmarks.compile --models resnet8+resnet20+resnet32 --implementations xla"""
_PARTS = ("ready_s", "trace_s", "compile_s", "first_step_s", "process_s")


@dataclass(frozen=True)
class CompileOptions(report.StepSize):
    """Time from the start of tracing to the end of the first step, with nothing compiled before."""

    command: ClassVar = Command("benchmarks.compile", examples=EXAMPLES)

    models: str | None = None
    """Three models joined by +; the graph of seven nodes has them again and again."""


def main() -> None:
    """Measures what the command line asks for."""
    measure(parse(CompileOptions), report.console())


def measure(options: CompileOptions, console: Console) -> dict[str, Any]:
    """Measures all cases, writes and prints the figures, and returns them.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: a worker failed.
    """
    report.check(options, known=OURS)
    graph = options.models or (QUICK_MODELS if options.quick else MODELS)
    models = report.models_of("models", graph)
    if len(models) != SIZES[0]:
        raise InputError("models", graph, f"{SIZES[0]} models joined by +")
    rounds = options.rounds or (1 if options.quick else 3)
    content: dict[str, Any] = {"machine": machine(), "cases": []}
    left_out = report.left_out(options, console)
    pairs = [(name, n) for name in report.ours_of(options) for n in report.thread_counts(options)]
    with report.progress(console, total=len(pairs)) as begin:
        for name, threads in pairs:
            begin(f"{name}, {threads} threads")
            shape = (options.image_size, options.image_size, 3)
            tasks = [
                Task(name, tuple(islice(cycle(models), n)), threads, options.batch_size, shape)
                for n in SIZES
            ]
            content["cases"] += _pair(tasks, rounds, left_out)
            report.save(options, content)
    console.print(_table(content["cases"]))
    return content


def _pair(tasks: Sequence[Task], rounds: int, left_out: Callable[[str], None]) -> list[Figures]:
    """Starts the small and the large graph in turns; the entry of each."""
    try:
        starts = interleaved({str(i): partial(_start, t) for i, t in enumerate(tasks)}, rounds)
    except Unavailable as reason:
        left_out(str(reason))
        return []
    entries: list[Figures] = []
    for task, found in zip(tasks, starts.values(), strict=True):
        known = [part for part in _PARTS if found[0][part] is not None]
        parts = {part: spread([figures[part] for figures in found]) for part in known}
        entry: Figures = {
            "graph": task.graph,
            "nodes": len(task.models),
            "cores": task.threads,
            "implementation": task.implementation,
            "rounds": rounds,
            **{key: parts[key].median if key in parts else None for key in _PARTS},
            "ready_quartiles_s": list(parts["ready_s"].quartiles),
        }
        small = entries[0] if entries else entry
        entries.append(entry | {"ratio": entry["ready_s"] / small["ready_s"]})
    return entries


def _start(task: Task) -> Figures:
    """Starts a process, and ends it when it is ready to train."""
    with Worker(task) as worker:
        return worker.figures


def _table(cases: Sequence[Figures]) -> Table:
    table = Table(title="Until ready to train, nothing compiled before (s; ratio: to 3 nodes)")
    for title in ("implementation", "cores", "nodes", "graph"):
        table.add_column(title)
    for title in ("ready", "ratio", "trace", "compile", "first step", "whole process"):
        table.add_column(title, justify="right")
    for case in cases:
        low, high = case["ready_quartiles_s"]
        table.add_row(
            case["implementation"],
            str(case["cores"]),
            str(case["nodes"]),
            report.short(case["graph"]),
            f"{case['ready_s']:.1f} ({low:.1f}-{high:.1f})",
            f"{case['ratio']:.2f}",
            *("-" if case[part] is None else f"{case[part]:.1f}" for part in _PARTS[1:]),
        )
    return table


if __name__ == "__main__":
    cli.run(
        main, interrupted="interrupted; finished cases are in the file of --json, if one was given"
    )
