"""Measures implementations side by side: each in a process of its own, which waits for its turn."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import benchmarks
from benchmarks.task import Figures, Task, Unavailable
from ktg_jax.errors import RunError

T = TypeVar("T")

ROOT = Path(str(benchmarks.__file__)).parents[1]
LOSS_TOLERANCE = 1e-4
_SETTLE_SECONDS = 0.02  # threads that spin for a while after their work must not disturb the next


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    median: float
    quartiles: tuple[float, float]


def spread(values: Sequence[float]) -> Spread:
    """The spread of some numbers.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, quartiles=(2.0, 4.0))
    """
    if len(values) == 1:
        return Spread(values[0], (values[0], values[0]))
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, (first, third))


def interleaved(
    turns: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 0
) -> dict[str, list[T]]:
    """Takes turns, A B C A B C ...: what disturbs the machine for a while disturbs all alike.

    Args:
        turns: what each does in its turn.
        rounds: turns of each that count.
        warm_up: turns of each before those, whose results are dropped.

    Returns:
        For each the results of its turns, one a round.

    >>> order = []
    >>> interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    {'a': [None, None], 'b': [None, None]}
    >>> order
    ['a', 'b', 'a', 'b']
    """
    results: dict[str, list[T]] = {name: [] for name in turns}
    for number in range(warm_up + rounds):
        for name, take_turn in turns.items():
            result = take_turn()
            if number >= warm_up:
                results[name].append(result)
    return results


def check_same_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Raises RunError unless all implementations have the first one's losses, relative 1e-4."""
    (first, expected), *others = losses.items()
    if not all(map(math.isfinite, expected)):
        raise RunError(f"{first}: losses not finite: {_shown(expected)}")
    for name, found in others:
        pairs = zip(expected, found, strict=True)
        if not all(math.isclose(a, b, rel_tol=LOSS_TOLERANCE) for a, b in pairs):
            raise RunError(
                f"{name} does not compute what {first} does: losses of the first step "
                f"{_shown(found)}, not {_shown(expected)}"
            )


class Worker:
    """A process that runs a task (`benchmarks.worker`); to be used in a `with` statement.

    Attributes:
        task: what it runs.
        losses: the losses of its first step.
        figures: what it took to get ready, in seconds; `process_s` is all of it, from the start of
            the process.

    Raises:
        Unavailable: the implementation does not exist here.
        RunError: the worker failed; one line with its last words.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        begin = time.perf_counter()
        self._process = start("benchmarks.worker", *task.arguments(), errors=self._errors)
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.losses: list[float] = ready["losses"]
        self.figures: Figures = ready["figures"] | {"process_s": time.perf_counter() - begin}

    def ask(self, command: str) -> Any:
        """The answer to a command."""
        assert self._process.stdin is not None
        time.sleep(_SETTLE_SECONDS)
        with suppress(BrokenPipeError):  # of a worker that has ended; its last words say more
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def steps(self, number: int) -> Figures:
        """Makes steps; raises RunError where the losses are no longer finite."""
        answer = self.ask(f"steps {number}")
        if not all(map(math.isfinite, answer["losses"])):
            raise RunError(f"{self._who}: losses not finite: {_shown(answer['losses'])}")
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does: it has nothing to lose."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> "Worker":
        """Gives itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        self.close()

    @property
    def _who(self) -> str:
        return f"worker {self.task.implementation} ({self.task.graph}, {self.task.threads} threads)"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last_words = self._errors.read().strip().splitlines()[-1:] or [f"exit code {code}"]
        if code == 2:
            raise Unavailable(f"{self.task.implementation}: {last_words[0]}")
        raise RunError(f"{self._who}: {last_words[0]}")


def start(module: str, *arguments: str, errors: Any, **environment: str) -> subprocess.Popen[str]:
    """Starts `python -m module` with pipes for input and output.

    It gets no Ctrl-C of its own: whoever started it ends it.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def output_of(what: str, module: str, *arguments: str, **environment: str) -> str:
    """Runs `python -m module` to its end; returns what it printed.

    Raises:
        RunError: it failed; names `what`, with its last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = start(module, *arguments, errors=errors, **environment)
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            process.communicate()
            raise
        if process.returncode:
            errors.seek(0)
            last_words = errors.read().strip().splitlines()[-1:] or [str(process.returncode)]
            raise RunError(f"{what}: {last_words[0]}")
        return output


def start_all(
    stack: ExitStack, tasks: Sequence[Task], left_out: Callable[[str], None]
) -> dict[str, Worker]:
    """Starts a worker for each task, one after the other, so that they do not disturb each other.

    Args:
        stack: ends them.
        tasks: the tasks of different implementations; the first must be available.
        left_out: called with a line for each that is not available; may raise.

    Raises:
        RunError: one of them failed, or computes something else than the first.
    """
    workers: dict[str, Worker] = {}
    for task in tasks:
        try:
            workers[task.implementation] = stack.enter_context(Worker(task))
        except Unavailable as reason:
            if not workers:
                raise RunError(str(reason)) from None
            left_out(str(reason))
    check_same_losses({name: worker.losses for name, worker in workers.items()})
    return workers


def _shown(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.6g}" for loss in losses)
