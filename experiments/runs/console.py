"""What commands print: every text as it is, whatever is in it, on whatever console."""

import codecs
import sys
from dataclasses import dataclass
from typing import IO, Any

import rich.table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import TextColumn
from rich.status import Status
from rich.text import Text

_ASCII = {"±": "+-", "…": "...", "–": "-", "−": "-", "×": "x"}  # noqa: RUF001
_ASCII_TABLE = str.maketrans(_ASCII)
_ERRORS = "ktg_jax.legible"


class _Console(Console):
    """A console that leaves a closed pipe to `cli.run`."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled; raises it again."""
        self.quiet = True
        raise


def make_console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console for a command.

    Args:
        file: to print to (default: standard output).
        width: in characters (default: that of the terminal, or 80).
    """
    return _Console(file=file, width=width, markup=False, emoji=False, highlight=False)


@dataclass(frozen=True)
class Verbatim:
    """A text in which brackets are brackets; a console of ASCII alone gets it legible."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The text, for rich."""
        yield self._on(options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Its width, for rich."""
        return Measurement.get(console, options, self._on(options))

    def _on(self, options: ConsoleOptions) -> Text:
        return Text(self.text.translate(_ASCII_TABLE) if options.ascii_only else self.text)


class Table(rich.table.Table):
    """A table whose cells are shown as they are."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Adds a row; texts are taken as `Verbatim`."""
        super().add_row(*(Verbatim(c) if isinstance(c, str) else c for c in cells), **options)


def busy(console: Console, text: str) -> Status:
    """Says, on a terminal, what is being done within the block."""
    return console.status(Text(text), spinner="line" if console.options.ascii_only else "dots")


def text_column(template: str) -> TextColumn:
    """A column of a progress bar; texts are shown as they are."""
    return TextColumn(template, markup=False)


def is_watched(console: Console) -> bool:
    """Whether a display may move there: it is a terminal, and no file or pipe."""
    return console.is_interactive and console.file.isatty()


def print_anything() -> None:
    """From now on standard output and errors take any text, whatever their encoding."""
    codecs.register_error(_ERRORS, _legible)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _legible(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end].translate(_ASCII_TABLE)
    return found.encode("ascii", "backslashreplace").decode("ascii"), error.end
