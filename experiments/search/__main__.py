"""`python -m experiments.search`."""

from ..runs import cli
from .command import main

if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
