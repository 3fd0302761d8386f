"""Small searches for tests: their options, a trainer that only pretends, and what is in a study."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ktg_jax as ktg
from experiments.search.config import SearchConfig, resolved
from experiments.search.extra import optuna
from experiments.search.records import TrialRecord
from experiments.search.storage import Turn, open_storage
from experiments.search.study import begin_study, records
from experiments.search.team import Orders
from experiments.search.trial import Trainer
from experiments.search.worker import Worker

STUDY = "tested"
Values = Callable[[ktg.Graph, int], Sequence[float | Exception]]


def small_search(workdir: str | Path | None = None, **changes: Any) -> SearchConfig:
    """A search over graphs of tiny networks, whose trials take a moment; uniform and at random."""
    defaults: dict[str, Any] = {
        "nodes": 2,
        "target": "tiny",
        "candidates": ("tiny",),
        "imports": ("tiny_models",),
        "train_limit": 200,
        "epochs": 3,
        "batch_size": 32,
        "trials": 6,
        "baselines": False,
        "sampler": "random",
        "draw": "uniform",
        "pruner": "asha",
        "trial_seeds": 1,
        "race": 0,
        "retrain_top": 1,
        "retrain_seeds": 2,
    }
    at = {} if workdir is None else {"workdir": str(workdir)}
    return SearchConfig(**defaults | at | changes)


def rising(graph: ktg.Graph, seed: int) -> list[float]:
    """Better with every epoch, and with every gate that is open."""
    open_gates = sum(gate != "cutoff" for row in graph.gates for gate in row)
    return [(open_gates + epoch / 10) / 10 for epoch in (1, 2, 3)]


class Killed(BaseException):
    """What a pretended training raises to end like a killed worker's: nothing catches it."""


class PretendedTrainer(Trainer):
    """Gives each graph the accuracies that a function says, and remembers what it was asked for."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.node_epochs = 0.0
        self.recorded_epochs = self.read_epochs = 0
        self.trained: list[tuple[ktg.Graph, int]] = []

    def epochs(self, graph: ktg.Graph, seed: int) -> Iterator[tuple[int, float]]:
        self.trained.append((graph, seed))
        self.node_epochs = 0.0
        for epoch, value in enumerate(self._values(graph, seed), start=1):
            if isinstance(value, Exception):
                raise value
            self.node_epochs += len(graph.nodes)
            yield epoch, value


def study_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def begin(url: str, config: SearchConfig, setting: Mapping[str, Any] | None = None) -> optuna.Study:
    """The study of a search, begun as the command does."""
    storage, space = open_storage(url), config.space()
    with Turn(url, STUDY):
        return begin_study(storage, STUDY, config, space, setting or resolved(config, space))


def worker(url: str, config: SearchConfig, trainer: PretendedTrainer, **orders: Any) -> Worker:
    given: dict[str, Any] = {"index": 0, "worker": "here/0", "storage": url, "study": STUDY}
    return Worker(Orders(config=config, **given | orders), trainer)


def work(url: str, config: SearchConfig, values: Values, workers: int = 1) -> PretendedTrainer:
    """Runs all trials of a search by workers in threads of their own."""
    begin(url, config)
    trainer = PretendedTrainer(values)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            worker(url, config, trainer, index=index, worker=f"here/{index}").search()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return trainer


def trials_of(url: str) -> list[TrialRecord]:
    """What is known of the trials of the study at `url`."""
    study = optuna.load_study(study_name=STUDY, storage=open_storage(url))
    return records(study.get_trials())
