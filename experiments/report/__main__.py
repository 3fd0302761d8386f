"""`python -m experiments.report`."""

from experiments.report.command import main
from experiments.runs import cli

if __name__ == "__main__":
    cli.run(main)
