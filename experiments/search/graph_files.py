"""The graphs of a search as files: what it has found, for whoever trains it."""

from collections.abc import Sequence
from pathlib import Path

import ktg_jax as ktg

from ..runs.graphs import BEST_GRAPH, GRAPHS, with_pretrained
from .records import TrialRecord


class GraphFiles:
    """Writes `graphs/N.json` for each trial N, and `best.json` for the best of the complete ones.

    Each is the graph pruned for its target, with pretrained frozen nodes.

    Args:
        folder: the folder of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[int] = set()
        self._best: TrialRecord | None = None

    def write(self, trials: Sequence[TrialRecord]) -> None:
        """Writes what is not written yet.

        Args:
            trials: all that are known of; a trial's graph stays what it is.

        Raises:
            OSError: a file cannot be written.
        """
        for trial in trials:
            if trial.graph is not None and trial.number not in self._written:
                self._write_trial(trial.number, trial.graph)
        best = max((t for t in trials if t.value is not None), key=_rank, default=None)
        if best is not None and best != self._best:
            assert best.graph is not None
            _trainable(best.graph).save(self._folder / BEST_GRAPH)
            self._best = best

    def _write_trial(self, number: int, graph: ktg.Graph) -> None:
        path = self._folder / GRAPHS / f"{number}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            _trainable(graph).save(path)
        self._written.add(number)


def _trainable(graph: ktg.Graph) -> ktg.Graph:
    return with_pretrained(graph.pruned())


def _rank(trial: TrialRecord) -> tuple[float, int]:
    """The order of trials: by value, the first of equal ones being the best."""
    return trial.value or 0.0, -trial.number
