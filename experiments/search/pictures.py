"""Pictures of the trials' graphs, as artifacts: what Optuna's dashboard shows beside a trial.

Optuna adds no artifact to a trial that has ended. So its worker adds an empty one before it trains,
and the command, which has time, draws it when the trial has ended.
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

import ktg_jax as ktg

from ..runs.console import make_console
from ..runs.pictures import drawn
from .extra import optuna
from .study import Trials, is_counted

_NAME = "graph.png"
_logger = logging.getLogger(__name__)


def announce(trial: optuna.Trial, artifacts: Path) -> None:
    """Adds the artifact that is going to be the picture of a running trial's graph.

    A trial that is run again has one already, which is that of its first run.

    Args:
        trial: that is running.
        artifacts: folder of the pictures; where it cannot be written the trial has none.
    """
    if optuna.artifacts.get_all_artifact_meta(trial):
        return
    try:
        artifacts.mkdir(exist_ok=True)
        store = optuna.artifacts.FileSystemArtifactStore(artifacts)
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder, _NAME)
            empty.touch()
            optuna.artifacts.upload_artifact(
                artifact_store=store, file_path=str(empty), study_or_trial=trial
            )
    except OSError as error:
        _logger.warning("trial %s has no picture: %s", trial.number, error)


class Pictures:
    """Draws the graphs of the trials that the workers of one folder have trained.

    Args:
        storage: the storage of the study that the trials are of.
        artifacts: folder of the pictures.
        owner: what the names of the folder's workers begin with.
        console: where to say that one cannot be drawn; then no further one is tried (default:
            standard output).
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        artifacts: Path,
        owner: str,
        console: Console | None = None,
    ) -> None:
        self._storage = storage
        self._artifacts = artifacts
        self._prefix = f"{owner}/"
        self._console = console or make_console()
        self._is_possible = True
        self._drawn: set[int] = set()

    def draw_one(self, trials: Trials) -> None:
        """Draws the first graph that has no picture, if there is one."""
        next(self._draw(trials), None)

    def draw_all(self, trials: Trials) -> None:
        """Draws all graphs that have no picture."""
        for _ in self._draw(trials):
            pass

    def _draw(self, trials: Trials) -> Iterator[int]:
        for trial, path in self._missing(trials) if self._is_possible else ():
            draw = partial(self._draw_trial, trial, path)
            self._is_possible = drawn(self._console, path, draw)
            if not self._is_possible:
                return
            yield trial.number

    def _missing(self, trials: Trials) -> Iterable[tuple[optuna.trial.FrozenTrial, Path]]:
        for trial in trials:
            is_own = trial.user_attrs.get("worker", "").startswith(self._prefix)
            if not (is_own and is_counted(trial)) or trial.number in self._drawn:
                continue
            self._drawn.add(trial.number)
            for artifact in optuna.artifacts.get_all_artifact_meta(trial, storage=self._storage):
                path = self._artifacts / artifact.artifact_id
                if artifact.filename == _NAME and not (path.is_file() and path.stat().st_size):
                    yield trial, path

    def _draw_trial(self, trial: optuna.trial.FrozenTrial, path: Path) -> None:
        # Imports matplotlib, which nobody should wait for before the workers are at work.
        from ktg_jax.draw import draw_graph

        graph = ktg.Graph.from_json(trial.user_attrs["graph"]).pruned()
        curve = trial.intermediate_values
        accuracies = {str(graph.nodes[0].name): curve[max(curve)]} if curve else {}
        self._artifacts.mkdir(exist_ok=True)
        drawn = path.with_suffix(".png")
        draw_graph(graph, [drawn], accuracies)
        os.replace(drawn, path)  # so it is never half there
