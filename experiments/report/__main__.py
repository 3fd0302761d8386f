"""`python -m experiments.report`."""

from ..runs import cli
from .command import main

if __name__ == "__main__":
    cli.run(main)
