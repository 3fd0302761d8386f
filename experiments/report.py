"""Makes the report of a search: `python -m experiments.report --help`."""

from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated

import tyro
from rich.console import Console

from experiments import cli

EXAMPLES = """Examples:
  python -m experiments.report runs/search-digits-1a2b3c4d
  python -m experiments.report runs/cifar100 --storage postgresql+psycopg://me:secret@db/studies"""


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML file, report.html, that shows a search, also one that still runs."""

    study_dir: Annotated[str, tyro.conf.Positional]
    """Folder of a search."""
    storage: str | None = None
    """Where its trials are, if that is another place now or needs a password."""


def main() -> None:
    """Reports what the command line says."""
    description = f"{cleandoc(ReportConfig.__doc__ or '')}\n\n{EXAMPLES}"
    config = tyro.cli(ReportConfig, prog="python -m experiments.report", description=description)
    report(config, Console())


def report(config: ReportConfig, console: Console) -> None:
    """Writes the report into the search's folder.

    Raises:
        InputError: no search there, its storage cannot be read, a module that it imports is gone,
            or the extra `search` is not installed.
    """
    from experiments.reporting.page import write_report
    from experiments.searching.folder import load_search

    study = load_search(config.study_dir, config.storage)
    with console.status("Drawing"):
        path = write_report(study, study.path / "report.html")
    console.print(f"Wrote {path}.", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
