"""TensorBoard files of a run (extra: tensorboard)."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ktg_jax.errors import InputError

from . import cli
from .shapes import Record


def require_tensorboard() -> None:
    """Raises InputError where tensorboardX is not installed, or cannot be imported."""
    allowed = 'False, or the extra: pip install "ktg_jax[tensorboard]"'
    try:
        import tensorboardX  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("tensorboard", True, allowed) from None
    except Exception as error:  # of a protobuf that does not fit, mostly
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("tensorboard", True, f"{allowed} ({reason})") from None


@contextmanager
def event_writer(
    folder: Path, records: Sequence[Record], wanted: bool, console: Console
) -> Iterator[Callable[[Record], None]]:
    """Gives a function that writes an epoch's record; does nothing unless `wanted`.

    The files are made anew from the records so far: what a killed run had not yet written to them
    is not lost. What cannot be written costs a line, and no training.
    """
    if not wanted:
        yield lambda record: None
        return
    events = _Events(folder, console)
    try:
        for record in records:
            events.write(record)
        yield events.write
    finally:
        events.close()


class _Events:
    """The files, until one of them cannot be written."""

    def __init__(self, folder: Path, console: Console) -> None:
        from tensorboardX import SummaryWriter

        self._folder, self._console = folder, console
        self._writer: Any = None
        shutil.rmtree(folder, ignore_errors=True)
        with self._no_cost():
            self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        """Writes an epoch's record."""
        if self._writer is None:
            return
        with self._no_cost():
            for node in record["nodes"]:
                for key, value in node.items():
                    if isinstance(value, float):
                        name = f"{key}/{node['name']}"
                        self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Ends the writing."""
        if self._writer is not None:
            with self._no_cost():
                self._writer.close()

    @contextmanager
    def _no_cost(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer = None
            cli.say(self._console, f"{self._folder} is not written any more: {error}")
