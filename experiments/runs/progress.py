"""How far a training is: a display that moves on a terminal, else a line an epoch."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from ktg_jax.data.cache import OnProgress

from . import cli
from .console import Table, is_watched, make_console, text_column
from .shapes import Record

_LINE_SECONDS = 20
_PACE_SECONDS = 1
"""Metrics of several steps may be read at one moment: a pace is that of some time."""


class Countdown:
    """Tells the time left by the pace since it was made.

    Args:
        total: how much there is to count.
        done: how many of it are done when it is made.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._first = done
        self._began = time.monotonic()

    def left(self, done: int) -> str:
        """`time left h:mm:ss`, when so much is done; `-` as long as nothing is known."""
        here = done - self._first
        if here <= 0:
            return "time left -"
        seconds = (self._total - done) * (time.monotonic() - self._began) / here
        minutes, seconds = divmod(round(max(seconds, 0)), 60)
        return f"time left {minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def counted(console: Console, what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of something are done: a bar on a terminal, else a line now and then.

    Args:
        console: where.
        what: is counted, in the plural.
        total: how many there are.
        done: how many of them are done already.

    Yields:
        A function to call with the number that is done.
    """
    countdown, said = Countdown(total, done), time.monotonic()
    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn())
    watched = is_watched(console)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not watched
    ) as progress:
        bar = progress.add_task(what, total=total, completed=done)

        def show(now: int) -> None:
            nonlocal said
            progress.update(bar, completed=now)
            if not watched and time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                cli.say(console, f"{now} of {total} {what}; {countdown.left(now)}")

        yield show


@contextmanager
def decoding_shown() -> Iterator[OnProgress]:
    """Draws bars for what is decoded within, if standard error is a terminal."""
    console = make_console(sys.stderr)
    with Progress(console=console, transient=True, disable=not is_watched(console)) as progress:
        bars: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(f"decoding {what}", total=total)
            progress.update(bars[what], completed=done)

        yield show


class Display:
    """Shows for each node its loss and accuracy, and for the run its pace and the time left.

    Args:
        rows: (name, model, mark) of each node; the mark says target or frozen.
        first_step: updates made before this process began.
        total_steps: the total steps of the whole run.
        epochs: the epochs of the whole run.
        batch_size: images a step.
        console: where to.
    """

    def __init__(
        self,
        rows: Sequence[tuple[str, str, str]],
        *,
        first_step: int,
        total_steps: int,
        epochs: int,
        batch_size: int,
        console: Console,
    ) -> None:
        self._rows = rows
        self._epochs = epochs
        self._batch_size = batch_size
        self._console = console
        self._countdown = Countdown(epochs, first_step * epochs // total_steps)
        self._recent: dict[str, np.ndarray] = {}
        self._first_at: float | None = None
        self._last: Record | None = None
        self._progress = Progress(
            text_column("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            text_column("steps, {task.fields[rate]} images/s, left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            "compiling", total=total_steps, completed=first_step, rate="-"
        )
        self._live = Live(
            console=console, refresh_per_second=4, get_renderable=self._render, transient=True
        )
        self._shown = is_watched(console)

    def __enter__(self) -> "Display":
        """Begins to show."""
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Clears the display."""
        if self._shown:
            self._live.stop()

    def step(self, number: int, metrics: dict[str, Any]) -> None:
        """Takes note of an update and its metrics."""
        for key in ("loss", "accuracy"):
            value = np.asarray(metrics[key])
            self._recent[key] = 0.95 * self._recent.get(key, value) + 0.05 * value
        if self._first_at is None:
            self._first_at = time.monotonic()
        is_known = time.monotonic() - self._first_at >= _PACE_SECONDS
        speed = self._progress.tasks[0].speed if is_known else None
        self._progress.update(
            self._task,
            completed=number,
            description="training",
            rate="-" if speed is None else f"{speed * self._batch_size:.0f}",
        )

    def epoch(self, record: Record) -> None:
        """Takes note of a finished epoch; where nothing moves, says so in a line."""
        is_first, self._last = self._last is None, record
        if not self._shown:
            left = self._countdown.left(record["epoch"])
            cli.say(self._console, f"{epoch_line(record, self._epochs)}; {left}")
        if is_first:  # which compiled, unlike those that are left
            self._countdown = Countdown(self._epochs, record["epoch"])

    def _render(self) -> Group:
        table = Table(box=None)
        table.add_column("node")
        table.add_column("model")
        table.add_column("")
        for title in ("loss", "accuracy", "val. loss", "val. accuracy"):
            table.add_column(title, justify="right")
        for i, (name, model, mark) in enumerate(self._rows):
            recent = [_number(self._recent[k][i] if self._recent else None) for k in _RECENT]
            last = self._last["nodes"][i] if self._last else {}
            stored = [_number(last.get(key)) for key in ("val_loss", "val_accuracy")]
            table.add_row(name, model, mark, *recent, *stored)
        return Group(table, self._progress)


_RECENT = ("loss", "accuracy")


def epoch_line(record: Record, epochs: int) -> str:
    """An epoch in a line: the target's accuracies and losses, and the pace.

    >>> target = {"name": "a", "train_accuracy": 0.5, "train_loss": 1.25, "val_accuracy": None}
    >>> epoch_line({"epoch": 2, "images_per_second": 640.2, "nodes": [target]}, 15)
    'epoch 2/15, a: train 50.00 % (loss 1.2500); 640 images/s'
    """
    target = record["nodes"][0]
    parts = [f"train {100 * target['train_accuracy']:.2f} % (loss {target['train_loss']:.4f})"]
    if target["val_accuracy"] is not None:
        accuracy, loss = target["val_accuracy"], target["val_loss"]
        parts.append(f"val. {100 * accuracy:.2f} % (loss {loss:.4f})")
    pace = f"{record['images_per_second']:.0f} images/s"
    return f"epoch {record['epoch']}/{epochs}, {target['name']}: {', '.join(parts)}; {pace}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
