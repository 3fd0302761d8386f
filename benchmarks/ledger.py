"""Searches in one process that never train the same graph with the same seed twice."""

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import ktg_jax as ktg
from experiments.runs.assemble import load
from experiments.search.config import SearchConfig, resolved
from experiments.search.database import sqlite_url
from experiments.search.extra import optuna
from experiments.search.plan import reserved
from experiments.search.race import Race, key_of
from experiments.search.records import TrialRecord, standings
from experiments.search.storage import Turn, open_storage
from experiments.search.study import begin_study, race_of, records
from experiments.search.team import Orders
from experiments.search.trial import FROZEN_COST, Trainer
from experiments.search.worker import Worker
from ktg_jax.data.dataset import Dataset

_STUDY = "found"
_TRIALS_AT_ONCE = 5
_MOST_IDLE = 5  # times that many trials without a new graph: then there is none left


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        graph: canonical.
        node_epochs: that were spent on it, an epoch of a frozen node being a third.
        trainings: whole or in part.
    """

    graph: ktg.Graph
    node_epochs: float
    trainings: int

    def to_json(self) -> dict[str, Any]:
        """The fields for JSON."""
        graph = json.loads(self.graph.to_json())
        return {"graph": graph, "node_epochs": self.node_epochs, "trainings": self.trainings}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Found":
        """The inverse of `to_json`."""
        return cls(**dict(fields) | {"graph": ktg.Graph.from_json(fields["graph"])})


class LedgerTrainer(Trainer):
    """A trainer that keeps what it has trained, and counts its cost each time it is asked for.

    Graphs are trained in their canonical form. Epochs are trained as they are asked for; networks
    that are trained alone first, and recordings, are not counted: they are the same for all.

    Attributes:
        node_epochs: as of `Trainer`, an epoch of a frozen node being a third, read or not.
        trained: node-epochs that were really trained.
    """

    def __init__(
        self, config: SearchConfig, dataset: Dataset, recordings: Path | None = None
    ) -> None:
        super().__init__(config.training(), dataset, jax.local_devices()[0], recordings)
        self.trained = 0.0
        self._all_epochs = config.epochs
        self._curves: dict[tuple[str, int], _Curve] = {}

    @property
    def graphs(self) -> int:
        """Graphs trained, wholly or in part; with several seeds several times."""
        return len(self._curves)

    def epochs(self, graph: ktg.Graph, seed: int) -> Iterator[tuple[int, float]]:
        """As of `Trainer`."""
        graph = graph.canonical()
        frozen = len(graph.frozen)
        cost = len(graph.nodes) - frozen + FROZEN_COST * frozen
        curve = self._curves.setdefault((key_of(graph), seed), _Curve())
        if curve.more is None and not curve.values:
            curve.more = super().epochs(graph, seed)
        spent = 0.0
        for epoch in range(1, self._all_epochs + 1):
            if len(curve.values) < epoch:
                assert curve.more is not None
                curve.values.append(next(curve.more)[1])
                self.trained += cost
                if epoch == self._all_epochs:
                    curve.more = None  # and with it the network
            spent += cost
            self.node_epochs, self.recorded_epochs, self.read_epochs = spent, 0, 0
            yield epoch, curve.values[epoch - 1]


@dataclass
class _Curve:
    """Accuracies of the epochs so far, and where more of them come from."""

    values: list[float] = dataclasses.field(default_factory=list)
    more: Iterator[tuple[int, float]] | None = None


Search = Callable[[SearchConfig], tuple[list[TrialRecord], Race | None]]
"""Searches until there are as many trials as a configuration says: all trials, and the race."""


@contextmanager
def scratch_search(config: SearchConfig, trainer: Trainer) -> Iterator[Search]:
    """A search in this process, whose study is gone afterwards; the trainer trains its trials."""
    space = config.space()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = sqlite_url(Path(folder) / "study.db")
        storage = open_storage(url)
        try:
            with Turn(url, _STUDY):
                study = begin_study(storage, _STUDY, config, space, resolved(config, space))

            def search(config: SearchConfig) -> tuple[list[TrialRecord], Race | None]:
                orders = Orders(config, index=0, worker="here/0", storage=url, study=_STUDY)
                Worker(orders, trainer).search()
                known = records(study.get_trials(deepcopy=False))
                return known, race_of(study, known)

            yield search
        finally:
            storage.engine.dispose()


def spend(
    config: SearchConfig, budget: float, search: Search, trials_at_once: int
) -> list[TrialRecord]:
    """Searches until so many node-epochs are spent, or the space has no other graph.

    Args:
        config: of the search; its number of trials does not count.
        budget: node-epochs.
        search: of `scratch_search`.
        trials_at_once: after so many it is looked at what is spent.

    Returns:
        The trials, the last of which may begin beyond the budget.
    """
    known: list[TrialRecord] = []
    spent, idle = 0.0, 0
    while spent < budget and idle < _MOST_IDLE:
        known, _ = search(dataclasses.replace(config, trials=len(known) + trials_at_once, race=0))
        before, spent = spent, spent_on(known)
        idle = idle + 1 if spent == before else 0
    return known


def spent_on(trials: Sequence[TrialRecord]) -> float:
    """The node-epochs of trials."""
    return sum(trial.node_epochs for trial in trials)


_TRAINERS: dict[str, LedgerTrainer] = {}
"""One a process and data."""


def found_graph(config: SearchConfig, budget: float | None, recordings: Path) -> Found:
    """Searches, and lets the best graphs race.

    Args:
        config: the configuration of the search.
        budget: node-epochs before the race; None: as many trials as the configuration says.
        recordings: folder for what frozen networks put out.
    """
    with scratch_search(config, _trainer(config, recordings)) as search:
        trials = config.trials
        if budget is not None:
            done = len(spend(config, budget, search, _TRIALS_AT_ONCE))
            enough = dataclasses.replace(config, trials=3 * done + 1000)
            trials = done + reserved(enough, config.space()).trials
        known, race = search(dataclasses.replace(config, trials=trials))
    best = standings(known, race)[0]
    trainings = sum(trial.duplicate_of is None for trial in known)
    return Found(best.graph.canonical(), spent_on(known), trainings)


def accuracies_on_test(
    config: SearchConfig, graphs: Sequence[str], seed: int, recordings: Path
) -> dict[str, float]:
    """The target's accuracy on the test images of each graph (JSON), trained with one seed."""
    dataset = load(config)
    judged = dataclasses.replace(dataset, val=dataset.test)
    trainer = LedgerTrainer(_shared(config), judged, recordings)
    found = {}
    for text in graphs:
        *_, (_, accuracy) = trainer.epochs(ktg.Graph.from_json(text), seed)
        found[text] = accuracy
    return found


def _trainer(config: SearchConfig, recordings: Path) -> LedgerTrainer:
    shared = _shared(config)
    key = repr(shared.training())
    if key not in _TRAINERS:
        _TRAINERS[key] = LedgerTrainer(shared, load(shared, with_test=False), recordings)
    return _TRAINERS[key]


def _shared(config: SearchConfig) -> SearchConfig:
    """With one seed for what all searches share: networks trained alone, the order of the data."""
    return dataclasses.replace(config, seed=0)
