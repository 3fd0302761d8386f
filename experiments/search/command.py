"""Searches for the graph that makes its target best: `python -m experiments.search --help`.

Without arguments: 30 graphs of three small networks on scikit-learn's digits, in a few minutes on
two CPU cores.
"""

from experiments.runs.console import make_console
from experiments.runs.process import prepare
from experiments.search.config import parse


def main() -> None:
    """Searches as the command line describes."""
    config = parse()
    prepare(config.compile_cache)
    from experiments.search.coordinate import search  # without Optuna: an error, not a traceback

    search(config, make_console())
