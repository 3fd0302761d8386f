"""Searches for the graph that makes its target best: `python -m experiments.search --help`.

Without arguments: 30 graphs of three small networks on scikit-learn's digits, in a few minutes on
two CPU cores.
"""

from ..runs.command_line import parse
from ..runs.console import make_console
from ..runs.process import prepare
from .config import SearchConfig


def main() -> None:
    """Searches as the command line describes."""
    config = parse(SearchConfig)
    prepare(config.compile_cache)
    from .coordinate import search  # without Optuna: an error, not a traceback

    search(config, make_console())
