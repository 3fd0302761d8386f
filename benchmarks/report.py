"""What the commands have in common: options and their checks, the display, the file they write."""

import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from benchmarks.machine import cores
from benchmarks.measure import Spread
from benchmarks.task import IMPLEMENTATIONS, OURS, Figures
from experiments.runs import cli
from experiments.runs.console import is_watched, make_console, text_column
from experiments.runs.options import at_least
from ktg_jax.errors import InputError
from ktg_jax.io.files import write_text
from ktg_jax.models import check_model

_FILE_WIDTH = 160


@dataclass(frozen=True)
class Output:
    """What every benchmark can be asked for."""

    json: str | None = None
    """File to write the figures to; written again after every case."""
    quick: bool = False
    """Fewer and smaller cases."""


@dataclass(frozen=True)
class Options(Output):
    """What a benchmark of implementations can be asked for."""

    implementations: tuple[str, ...] = ()
    """Which to measure; else all that are available here."""
    threads: tuple[int, ...] = ()
    """CPU cores to use; one number after the other. Else 1 and 2, where there are two; with
    --quick the most of these."""
    rounds: int | None = None
    """Turns of each that count."""


@dataclass(frozen=True)
class StepSize(Options):
    """What a benchmark of training steps can be asked for, too."""

    batch_size: int = 64
    """Images a step."""
    image_size: int = 32
    """Pixels a side."""


def check(options: Options, known: Sequence[str] = tuple(IMPLEMENTATIONS)) -> None:
    """Raises InputError for the first option that is out of range, before anything is computed."""
    for name in options.implementations:
        if name not in known:
            raise InputError("implementations", name, ", ".join(known))
    if options.implementations and not ours_of(options):
        raise InputError(
            "implementations", list(options.implementations), f"also {', '.join(OURS)}"
        )
    for threads in options.threads:
        if not 1 <= threads <= cores():
            raise InputError("threads", threads, f"1 to {cores()}, the cores of this machine")
    numbers = ("rounds", "steps", "batch_size", "image_size")
    at_least(options, 1, *(field for field in numbers if hasattr(options, field)))
    check_output(options)


def check_output(options: Output) -> None:
    """Raises InputError where the file cannot be written."""
    if options.json is not None and not os.access(Path(options.json).absolute().parent, os.W_OK):
        raise InputError("json", options.json, "a file in a folder that can be written")


def require_torch() -> None:
    """Raises InputError where the baseline cannot run."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("implementations", "torch", 'the extra: pip install "ktg_jax[bench]"')


def models_of(field: str, graph: str) -> tuple[str, ...]:
    """The models of a graph written as `resnet8+resnet32`; InputError: one that does not exist."""
    models = tuple(graph.split("+"))
    for model in models:
        try:
            check_model(model)
        except InputError as error:
            raise InputError(field, graph, f"models joined by +: {error.allowed}") from None
    return models


def short(graph: str) -> str:
    """A graph for a table.

    >>> short("resnet8+resnet32+resnet8+resnet8")
    '3 x resnet8, resnet32'
    """
    counts = Counter(graph.split("+"))
    return ", ".join(model if n == 1 else f"{n} x {model}" for model, n in counts.items())


def console() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    return make_console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def thread_counts(options: Options) -> tuple[int, ...]:
    """The numbers of cores to measure with."""
    available = tuple(n for n in (1, 2) if n <= cores())
    return options.threads or (available[-1:] if options.quick else available)


def ours_of(options: Options) -> tuple[str, ...]:
    """Our implementations to measure."""
    return tuple(name for name in OURS if name in (options.implementations or OURS))


def left_out(options: Options, console: Console) -> Callable[[str], None]:
    """What to do about an implementation that is not available, which a line says.

    Raises InputError if it was asked for by name; else the line is printed, once.
    """
    said: set[str] = set()

    def say(reason: str) -> None:
        if options.implementations:
            raise InputError("implementations", reason.partition(":")[0], f"others ({reason})")
        if reason not in said:
            said.add(reason)
            cli.say(console, f"Left out: {reason}.")

    return say


def save(options: Output, content: Mapping[str, Any]) -> None:
    """Writes the figures, if there is a file for them; it is always whole."""
    if options.json is not None:
        try:
            write_text(options.json, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                "json", options.json, f"a file that can be written ({error})"
            ) from None


def figures_of(name: str, values: Spread) -> Figures:
    """A spread under a name, as it is written: `<name>_s` and `<name>_quartiles_s`."""
    return {f"{name}_s": values.median, f"{name}_quartiles_s": list(values.quartiles)}


def seconds(values: Spread | None) -> str:
    """A median and its quartiles for a table."""
    if values is None:
        return "-"
    low, high = values.quartiles
    return f"{values.median:.3f} ({low:.3f}-{high:.3f})"


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Shows how far a benchmark is, on a terminal; gives a function to call as each part begins.

    It redraws only then: nothing of ours may run while something is measured.
    """
    columns = text_column("{task.description}"), BarColumn(), MofNCompleteColumn()
    shown = is_watched(console)
    display = Progress(*columns, console=console, auto_refresh=False, disable=not shown)
    with display:
        task = display.add_task("", total=total)
        begun = -1

        def begin(what: str) -> None:
            nonlocal begun
            begun += 1
            if not shown:
                cli.say(console, f"{what} ({begun + 1} of {total})")
            display.update(task, description=what, completed=begun, refresh=True)

        yield begin
