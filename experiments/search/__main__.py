"""`python -m experiments.search`."""

from experiments.runs import cli
from experiments.search.command import main

if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
