"""Searches for the graph that makes its target best: `python -m experiments.search --help`.

Without arguments: 30 graphs of three small networks on scikit-learn's digits, in a few minutes on
two CPU cores.
"""

from experiments import cli
from experiments.console import make_console
from experiments.process import prepare
from experiments.searching.config import parse


def main() -> None:
    """Searches as the command line describes."""
    config = parse()
    prepare(config.compile_cache)
    from experiments.searching.coordinate import search  # without Optuna: an error, not a traceback

    search(config, make_console())


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
