"""The live display of a training run; quiet where nobody watches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Record = dict[str, Any]


class Display:
    """Shows for each node its loss and accuracy, and for the run its pace and the time left.

    Args:
        rows: (name, model, mark) of each node; the mark says target or frozen.
        first_step: updates made before this process began.
        total_steps: of the whole run.
        batch_size: images a step.
        console: where to; nothing is shown unless it is a terminal.
    """

    def __init__(
        self,
        rows: Sequence[tuple[str, str, str]],
        *,
        first_step: int,
        total_steps: int,
        batch_size: int,
        console: Console,
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._recent: dict[str, np.ndarray] = {}
        self._last: Record | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, {task.fields[rate]} images/s, left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            "compiling", total=total_steps, completed=first_step, rate="-"
        )
        self._live = Live(
            console=console, refresh_per_second=4, get_renderable=self._render, transient=True
        )
        self._shown = console.is_terminal

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
        speed = self._progress.tasks[0].speed
        self._progress.update(
            self._task,
            completed=number,
            description="training",
            rate="-" if speed is None else f"{speed * self._batch_size:.0f}",
        )

    def epoch(self, record: Record) -> None:
        """Takes note of a finished epoch."""
        self._last = record

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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
