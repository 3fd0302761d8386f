"""The graphs of a search as files: what it has found, for whoever trains it."""

from collections.abc import Sequence
from pathlib import Path

import ktg_jax as ktg

from ..runs.graphs import BEST_GRAPH, GRAPHS, with_pretrained
from .race import Race
from .records import TrialRecord, standings


class GraphFiles:
    """Writes `graphs/N.json` for each trial N, and `best.json` for the best of the complete ones.

    Each is the graph pruned for its target, with pretrained frozen nodes.

    Args:
        folder: the folder of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[int] = set()
        self._best: ktg.Graph | None = None

    def write(self, trials: Sequence[TrialRecord], race: Race | None = None) -> None:
        """Writes what is not written yet.

        Args:
            trials: all that are known of; a trial's graph stays what it is.
            race: which of them are best, as far as it goes.

        Raises:
            OSError: a file cannot be written.
        """
        for trial in trials:
            if trial.graph is not None and trial.number not in self._written:
                self._write_trial(trial.number, trial.graph)
        best = next(iter(standings(trials, race)), None)
        if best is not None and best.graph != self._best:
            _trainable(best.graph).save(self._folder / BEST_GRAPH)
            self._best = best.graph

    def _write_trial(self, number: int, graph: ktg.Graph) -> None:
        path = self._folder / GRAPHS / f"{number}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            _trainable(graph).save(path)
        self._written.add(number)


def _trainable(graph: ktg.Graph) -> ktg.Graph:
    return with_pretrained(graph.pruned())
