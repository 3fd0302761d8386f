"""`python -m experiments.ablation`."""

from experiments.ablation.command import main
from experiments.runs import cli

if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
