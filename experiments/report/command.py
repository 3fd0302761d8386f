"""Makes the report of a search: `python -m experiments.report --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console

from ktg_jax.errors import InputError, RunError

from ..runs import cli
from ..runs.command_line import Command, parse
from ..runs.console import busy, make_console
from ..search.records import StudyRecord

EXAMPLES = r"""Examples:
  python -m experiments.report runs/search-digits-1a2b3c4d
  python -m experiments.report runs/cifar100 \
      --storage postgresql+psycopg://me@db/studies"""


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML file that shows a search, also one that still runs."""

    command: ClassVar = Command("experiments.report", examples=EXAMPLES)

    study_dir: Annotated[str, tyro.conf.Positional, "DIR"]
    """Folder of a search."""
    storage: Annotated[str | None, "URL"] = None
    """Where its trials are now; else where they were in the search. A password is better given by
    PGPASSWORD or ~/.pgpass."""
    output: Annotated[str | None, "FILE"] = None
    """The file to write; else report.html in the search's folder, which is only read otherwise."""


def main() -> None:
    """Reports what the command line says."""
    config = parse(ReportConfig)
    report(config, make_console())


def report(config: ReportConfig, console: Console) -> None:
    """Writes the report into the search's folder, or where it is wanted.

    Raises:
        InputError: no search there, its storage cannot be read, a module that it imports is gone,
            the extra `search` is not installed, or the file cannot be written.
        RunError: a picture cannot be drawn.
    """
    from ..search.folder import load_search
    from .extra import jinja2  # first: without it, an error and no traceback

    assert jinja2
    study = load_search(config.study_dir, config.storage)
    path = study.path / "report.html" if config.output is None else Path(config.output)
    with busy(console, "Drawing"):
        _write(study, path)
    cli.say(console, f"Wrote {path}.")


def _write(study: StudyRecord, path: Path) -> None:
    try:
        from .page import write_report

        write_report(study, path)
    except InputError:
        raise
    except OSError as error:
        allowed = f"a file that can be written ({error}); --output FILE writes another"
        raise InputError("output", str(path), allowed) from None
    except Exception as error:  # of matplotlib, whose settings are the user's
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"the report of {study.path} cannot be drawn ({reason})") from error
