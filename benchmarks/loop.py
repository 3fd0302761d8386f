"""Times the training loop: `python -m benchmarks.loop --help`.

`experiments.train` makes batches, augments, reads metrics, evaluates and saves; a bare loop over
the same graph makes steps on one batch and nothing else. And: how long after its start the default
job has made its first step, the first time and the second.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.machine import machine
from benchmarks.measure import Spread, Worker, interleaved, output_of, spread
from benchmarks.task import IMPLEMENTATIONS, OURS, SEED, Figures, Task, Unavailable
from experiments.runs import cli
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table

EXAMPLES = """Examples:
  python -m benchmarks.loop
  python -m benchmarks.loop --quick --json loop.json
  python -m benchmarks.loop --implementations xla --threads 2 --rounds 5"""


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        data: name of the data set; `random`: an npz file of as many random images as there are.
        models: the models of the nodes.
        image_shape: height, width and channels.
        epochs: the epochs of `experiments.train`; the first, which compiles, does not count.
        images: how many the random data set has.
        steps: how many the bare loop makes in its turn.
    """

    data: str
    models: tuple[str, ...]
    image_shape: tuple[int, int, int]
    epochs: int
    steps: int
    images: int = 0


JOBS = (
    Job("digits", ("cnn", "cnn", "cnn"), (8, 8, 1), epochs=15, steps=200),
    Job("random", ("resnet8", "resnet8"), (32, 32, 3), epochs=2, steps=60, images=25600),
)
QUICK_JOBS = (
    Job("digits", ("cnn", "cnn", "cnn"), (8, 8, 1), epochs=10, steps=200),
    Job("random", ("resnet8", "resnet8"), (32, 32, 3), epochs=3, steps=10, images=640),
)
BATCH_SIZE = 64
NUM_CLASSES = 10


@dataclass(frozen=True)
class LoopOptions(report.Options):
    """Time experiments.train against a bare loop of steps over the same graph, and its start."""

    command: ClassVar = Command("benchmarks.loop", examples=EXAMPLES)


def main() -> None:
    """Measures what the command line asks for."""
    measure(parse(LoopOptions), report.console())


def measure(
    options: LoopOptions,
    console: Console,
    jobs: Sequence[Job] | None = None,
    start_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures all cases, writes and prints the figures, and returns them.

    Args:
        options: the options of the command line.
        console: where to.
        jobs: to measure in place of those that the options imply.
        start_options: options of `experiments.train`, to start another job than the default one.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: a worker, or the training, failed.
    """
    report.check(options, known=OURS)
    jobs = jobs or (QUICK_JOBS if options.quick else JOBS)
    rounds = options.rounds or (1 if options.quick else 3)
    content: dict[str, Any] = {"machine": machine(), "cases": [], "starts": []}
    left_out = report.left_out(options, console)
    pairs = [(name, n) for name in report.ours_of(options) for n in report.thread_counts(options)]
    with report.progress(console, total=len(pairs) * (len(jobs) + 1)) as begin:
        for name, threads in pairs:
            for job in jobs:
                begin(f"{name}, {threads} threads, {job.data}")
                content["cases"] += _case(job, name, threads, rounds, left_out)
                report.save(options, content)
            begin(f"{name}, {threads} threads, start")
            if any(case["implementation"] == name for case in content["cases"]):
                content["starts"].append(_starts(name, threads, rounds, start_options))
                report.save(options, content)
    console.print(_loop_table(content["cases"]), _start_table(content["starts"]))
    return content


def _case(
    job: Job, name: str, threads: int, rounds: int, left_out: Callable[[str], None]
) -> list[Figures]:
    """Trains and loops in turns; the entry, if the implementation is available."""
    task = Task(name, job.models, threads, BATCH_SIZE, job.image_shape, NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            worker = stack.enter_context(Worker(task))
        except Unavailable as reason:
            left_out(str(reason))
            return []
        options = _train_options(job, Path(folder))

        def train() -> float:
            workdir = tempfile.mkdtemp(dir=folder)
            _train(name, threads, "end", *options, "--workdir", workdir, "--no-resume")
            lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
            rates = [json.loads(line)["images_per_second"] for line in lines]
            return spread(rates[1:] or rates).median

        def bare() -> float:
            return job.steps * BATCH_SIZE / worker.ask(f"loop {job.steps}")["seconds"]

        bare()  # the first turn warms it up
        rates = interleaved({"train": train, "bare": bare}, rounds)
    found = {key: spread(values) for key, values in rates.items()}
    return [
        {
            "data": job.data,
            "graph": task.graph,
            "cores": threads,
            "implementation": name,
            "batch_size": BATCH_SIZE,
            "rounds": rounds,
            **{f"{key}_images_per_second": value.median for key, value in found.items()},
            **{f"{key}_quartiles": list(value.quartiles) for key, value in found.items()},
            "ratio": found["train"].median / found["bare"].median,
        }
    ]


def _train_options(job: Job, folder: Path) -> list[str]:
    options = ["--models", *job.models, "--batch-size", str(BATCH_SIZE)]
    options += ["--epochs", str(job.epochs)]
    if job.data != "random":
        return [*options, "--data", job.data]
    rng = np.random.default_rng(SEED)
    images = rng.integers(256, size=(job.images, *job.image_shape), dtype=np.uint8)
    np.savez(folder / "random.npz", images=images, labels=np.arange(job.images) % NUM_CLASSES)
    # Labels of random images cannot be learnt at a high rate without accidents.
    more = ["--val-fraction", "0", "--learning-rate", "0.01"]
    return [*options, "--data", f"npz:{folder / 'random.npz'}", *more]


def _starts(name: str, threads: int, rounds: int, options: Sequence[str]) -> Figures:
    """Starts a job twice in a row, with an empty cache and with what is in it then."""

    def twice() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as cache:

            def once() -> float:
                with tempfile.TemporaryDirectory() as folder:
                    arguments = "first_step", *options, "--workdir", str(Path(folder) / "run")
                    return _train(name, threads, *arguments, KTG_CACHE_DIR=cache)

            return once(), once()

    found = [twice() for _ in range(rounds)]
    first, second = (spread(seconds) for seconds in zip(*found, strict=True))
    return {
        "cores": threads,
        "implementation": name,
        "rounds": rounds,
        **report.figures_of("first_start", first),
        **report.figures_of("second_start", second),
    }


def _train(name: str, threads: int, *arguments: str, **environment: str) -> float:
    """Runs `experiments.train` in a process; returns the seconds from its start to its end."""
    how = IMPLEMENTATIONS[name]
    environment |= {"KTG_CPU_CONVOLUTION": how.convolution}
    arguments += ("--engine", how.engine, "--cpu-devices", str(threads if how.spread else 1))
    begin = time.perf_counter()
    what = f"experiments.train ({name}, {threads} threads)"
    output_of(what, "benchmarks.training", str(threads), *arguments, **environment)
    return time.perf_counter() - begin


def _loop_table(cases: Sequence[Figures]) -> Table:
    table = Table(title="Images per second (median and quartiles; ratio: train / bare)")
    for title in ("data", "graph", "cores", "implementation"):
        table.add_column(title)
    for title in ("experiments.train", "bare loop", "ratio"):
        table.add_column(title, justify="right")
    for case in cases:
        rates = [
            "{:.0f} ({:.0f}-{:.0f})".format(
                case[f"{key}_images_per_second"], *case[f"{key}_quartiles"]
            )
            for key in ("train", "bare")
        ]
        ratio = f"{case['ratio']:.3f}"
        cells = (
            case["data"],
            report.short(case["graph"]),
            str(case["cores"]),
            case["implementation"],
        )
        table.add_row(*cells, *rates, ratio)
    return table


def _start_table(starts: Sequence[Figures]) -> Table:
    table = Table(title="The default job: from its start to the end of its first step (s)")
    for title in ("implementation", "cores"):
        table.add_column(title)
    for title in ("first start", "second start"):
        table.add_column(title, justify="right")
    for found in starts:
        table.add_row(
            found["implementation"],
            str(found["cores"]),
            *(
                report.seconds(Spread(found[f"{key}_s"], tuple(found[f"{key}_quartiles_s"])))
                for key in ("first_start", "second_start")
            ),
        )
    return table


if __name__ == "__main__":
    cli.run(
        main, interrupted="interrupted; finished cases are in the file of --json, if one was given"
    )
