"""Times one training step against PyTorch: `python -m benchmarks.step --help`.

PyTorch and one implementation of ours after the other wait in processes of their own, on the same
cores, and take turns. They start from the same weights; unless they agree on the losses nothing is
timed. Each result is said and written as soon as it is there.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
from rich.console import Console

import ktg_jax as ktg
from benchmarks import report
from benchmarks.flops import train_step_flops
from benchmarks.machine import machine
from benchmarks.measure import (
    Spread,
    Worker,
    check_same_losses,
    interleaved,
    spread,
    start_all,
)
from benchmarks.ours import initial_state
from benchmarks.task import (
    BASELINE,
    COMPILED_BASELINE,
    IMPLEMENTATIONS,
    OURS,
    Figures,
    Task,
    Unavailable,
)
from experiments.runs import cli
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table
from ktg_jax.errors import InputError
from ktg_jax.models.projected_resnet import IMAGENET

CASES = (
    "resnet32",
    "resnet32+resnet32",
    "resnet8+resnet8+resnet8",
    "resnet32+resnet110+wrn28_2",
    "resnet8+resnet20+resnet32+wrn28_2",
    "resnet20+resnet20+resnet20+resnet20+resnet20",
    "resnet8+resnet20+resnet32+resnet8+resnet20+resnet32",
    "resnet32+resnet32+resnet32+resnet32+resnet32+resnet32+resnet32",
)
QUICK_CASES = ("resnet32+resnet110+wrn28_2",)
QUICK_IMPLEMENTATIONS = ("xla", "onednn", "onednn_per_node")
EXAMPLES = """Examples:
  python -m benchmarks.step
  python -m benchmarks.step --quick --json step.json
  python -m benchmarks.step --cases resnet32+resnet110+wrn28_2 --implementations xla --threads 2"""


@dataclass(frozen=True)
class StepOptions(report.StepSize):
    """Time one training step of a graph against PyTorch, side by side."""

    command: ClassVar = Command("benchmarks.step", examples=EXAMPLES)

    cases: tuple[str, ...] = ()
    """Graphs, as models joined by +; in each every node learns from every other."""
    steps: int = 2
    """Steps a turn."""


def main() -> None:
    """Measures what the command line asks for."""
    measure(parse(StepOptions), report.console())


def measure(options: StepOptions, console: Console) -> dict[str, Any]:
    """Measures all cases, writes and prints the figures, and returns them.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: a worker failed, or computes something else than the baseline.
    """
    report.check(options)
    report.require_torch()
    cases = options.cases or (QUICK_CASES if options.quick else CASES)
    tasks = [
        _tasks(options, report.models_of("cases", case), threads)
        for case in cases
        for threads in report.thread_counts(options)
    ]
    content: dict[str, Any] = {"machine": machine() | {"matmul_peak": {}}, "cases": []}
    left_out = report.left_out(options, console)
    number = sum(task.implementation in OURS for of_case in tasks for task in of_case)
    with report.progress(console, total=number) as begin:
        for of_case in tasks:
            for entry, peaks in _results(of_case, options, begin, left_out):
                content["cases"].append(entry)
                _add_peaks(content, str(entry["cores"]), peaks)
                report.save(options, content)
                cli.say(console, _line(entry))
    console.print(_time_table(content["cases"]), _figure_table(content["cases"]))
    return content


def _is_of_baseline(model: str) -> bool:
    """Whether PyTorch's network of that name is the same.

    >>> [_is_of_baseline(model) for model in ("resnet32", "wrn28_2", "resnet8x4", "resnet50")]
    [True, True, False, False]
    """
    found = re.fullmatch(r"resnet(\d+)|wrn(\d+)_\d+", model)
    return (
        found is not None
        and int(found[1] or found[2]) % 6 == (2 if found[1] else 4)
        and (model not in IMAGENET)
    )


def _tasks(options: StepOptions, models: tuple[str, ...], threads: int) -> list[Task]:
    """The implementations of a case, the baseline first."""
    for model in models:
        if not _is_of_baseline(model):
            raise InputError("cases", model, "resnet<6n+2> and wrn<6n+4>_<width>, as the baseline")
    wanted = options.implementations
    if not wanted:
        wanted = QUICK_IMPLEMENTATIONS if options.quick else tuple(IMPLEMENTATIONS)
        if _compiler() is None:
            wanted = tuple(name for name in wanted if name != COMPILED_BASELINE)
    shape = (options.image_size, options.image_size, 3)
    return [
        Task(name, models, threads, options.batch_size, shape)
        for name in IMPLEMENTATIONS
        if name in (BASELINE, *wanted)
    ]


def _compiler() -> str | None:
    """What torch.compile needs on a CPU."""
    return next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def _results(
    tasks: Sequence[Task],
    options: StepOptions,
    begin: Callable[[str], None],
    left_out: Callable[[str], None],
) -> Iterator[tuple[Figures, dict[str, float]]]:
    """Measures a graph with a number of threads: each of ours beside PyTorch, the fastest first.

    Yields:
        The entry of one of our implementations, and the peaks by framework.
    """
    rounds = options.rounds or (3 if options.quick else 7)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        _save_weights(tasks[0], Path(folder))
        tasks = [replace(task, weights=folder) for task in tasks]
        theirs = [task for task in tasks if task.implementation not in OURS]
        baselines = start_all(stack, theirs, left_out)
        for task in reversed([task for task in tasks if task.implementation in OURS]):
            begin(f"{task.graph}, {task.threads} threads, {task.implementation}")
            try:
                worker = Worker(task)
            except Unavailable as reason:
                left_out(str(reason))
                continue
            with worker:
                workers = {**baselines, task.implementation: worker}
                check_same_losses({name: each.losses for name, each in workers.items()})
                turns = {name: partial(_turn, w, options.steps) for name, w in workers.items()}
                answers = interleaved(turns, rounds, warm_up=1)
                measured = {name: _measured(w, answers[name]) for name, w in workers.items()}
                peaks = {
                    IMPLEMENTATIONS[name].framework: w.ask("peak")["flops_per_second"]
                    for name, w in workers.items()
                }
            yield _entry(task, task.implementation, answers, measured), peaks


def _add_peaks(content: dict[str, Any], cores: str, peaks: dict[str, float]) -> None:
    """Keeps the best matrix product of all cases, and says what share of it each step reached."""
    best = content["machine"]["matmul_peak"].setdefault(cores, {})
    for library, flops_per_second in peaks.items():
        best[library] = max(best.get(library, 0.0), flops_per_second)
    for case in content["cases"]:
        for side in ("ours", "baseline", "compiled_baseline"):
            if str(case["cores"]) == cores and (figures := case[side]) is not None:
                share = figures["flops_per_second"] / max(best.values())
                figures["share_of_matmul_peak"] = share


def _save_weights(task: Task, folder: Path) -> None:
    """Writes the nodes' weights, with which ours starts, for PyTorch."""
    node_fns = [ktg.build_model(model, task.num_classes) for model in task.models]
    state = initial_state(task, node_fns, ktg.sgd())
    for i, model in enumerate(task.models):
        ktg.save_node(
            folder / f"{i}.safetensors",
            jax.device_get(state.params[i]),
            jax.device_get(state.model_state[i]),
            model=model,
            num_classes=task.num_classes,
            image_shape=task.image_shape,
        )


def _turn(worker: Worker, steps: int) -> Figures:
    """Some steps, after one that brings back what the caches and the system have put aside."""
    worker.steps(1)
    return worker.steps(steps)


def _measured(worker: Worker, answers: Sequence[Figures]) -> Figures:
    """The figures of one implementation."""
    task = worker.task
    times = spread([s for answer in answers for s in answer["seconds"]])
    host = [s for answer in answers for s in answer["host_seconds"] if s is not None]
    flops = sum(
        train_step_flops(model, task.batch_size, task.image_shape, task.num_classes)
        for model in task.models
    )
    return {
        **report.figures_of("step", times),
        "images_per_second_per_node": task.batch_size / times.median,
        "flops": flops,
        "flops_by_compiler": worker.figures["flops"],
        "flops_per_second": flops / times.median,
        "host_s": spread(host).median if host else None,
        "peak_memory_bytes": worker.ask("memory")["peak_bytes"],
        **{key: value for key, value in worker.figures.items() if key != "flops"},
    }


def _entry(
    task: Task, name: str, answers: dict[str, list[Figures]], measured: dict[str, Figures]
) -> Figures:
    """What is written of one of our implementations."""
    ours, baseline = measured[name], measured[BASELINE]
    compiled = measured.get(COMPILED_BASELINE)
    by_round = [
        spread(a["seconds"]).median / spread(b["seconds"]).median
        for a, b in zip(answers[BASELINE], answers[name], strict=True)
    ]
    return {
        "graph": task.graph,
        "cores": task.threads,
        "implementation": name,
        "batch_size": task.batch_size,
        "image_shape": list(task.image_shape),
        "rounds": len(by_round),
        "ours_s": ours["step_s"],
        "baseline_s": baseline["step_s"],
        "ratio": baseline["step_s"] / ours["step_s"],
        "ratio_quartiles": list(spread(by_round).quartiles),
        "compiled_baseline_s": compiled["step_s"] if compiled else None,
        "compiled_ratio": compiled["step_s"] / ours["step_s"] if compiled else None,
        "ours": ours,
        "baseline": baseline,
        "compiled_baseline": compiled,
    }


def _line(case: Figures) -> str:
    """A result, as soon as it is there."""
    low, high = case["ratio_quartiles"]
    which = f"{case['graph']}, {case['cores']} cores, {case['implementation']}"
    return (
        f"{which}: {case['ours_s']:.3f} s, "
        f"PyTorch {case['baseline_s']:.3f} s, ratio {case['ratio']:.2f} ({low:.2f}-{high:.2f})"
    )


def _time_table(cases: Sequence[Figures]) -> Table:
    table = Table(title="One training step (median and quartiles; ratio: PyTorch / ours)")
    for title in ("graph", "cores", "implementation"):
        table.add_column(title)
    for title in ("ours, s", "PyTorch, s", "ratio", "to torch.compile"):
        table.add_column(title, justify="right")
    for case in cases:
        low, high = case["ratio_quartiles"]
        table.add_row(
            *_labels(case),
            _time(case["ours"]),
            _time(case["baseline"]),
            f"{case['ratio']:.2f} ({low:.2f}-{high:.2f})",
            "-" if case["compiled_ratio"] is None else f"{case['compiled_ratio']:.2f}",
        )
    return table


def _figure_table(cases: Sequence[Figures]) -> Table:
    table = Table(title="The same, further (share: of the best matrix product)")
    for title in ("graph", "cores", "implementation"):
        table.add_column(title)
    for title in ("images/s a node", "GFLOP", "share", "PyTorch's", "trace, s", "compile, s"):
        table.add_column(title, justify="right")
    for title in ("host, ms", "memory, GB", "PyTorch's"):
        table.add_column(title, justify="right")
    for case in cases:
        ours, baseline = case["ours"], case["baseline"]
        table.add_row(
            *_labels(case),
            f"{ours['images_per_second_per_node']:.0f}",
            f"{ours['flops'] / 1e9:.1f}",
            f"{100 * ours['share_of_matmul_peak']:.0f} %",
            f"{100 * baseline['share_of_matmul_peak']:.0f} %",
            _number(ours["trace_s"]),
            _number(ours["compile_s"]),
            _number(ours["host_s"], 1000),
            _number(ours["peak_memory_bytes"], 2**-30),
            _number(baseline["peak_memory_bytes"], 2**-30),
        )
    return table


def _labels(case: Figures) -> tuple[str, str, str]:
    return report.short(case["graph"]), str(case["cores"]), case["implementation"]


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:.2f}"


def _time(figures: Figures) -> str:
    return report.seconds(Spread(figures["step_s"], tuple(figures["step_quartiles_s"])))


if __name__ == "__main__":
    cli.run(
        main, interrupted="interrupted; finished cases are in the file of --json, if one was given"
    )
