"""Workers that are gone: their trials are run again, and none is lost; what kills them ends."""

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from searches import (
    STUDY,
    Killed,
    PretendedTrainer,
    begin,
    rising,
    small_search,
    study_url,
    trials_of,
    work,
    worker,
)

import ktg_jax as ktg
from experiments.search.extra import optuna
from experiments.search.samplers import suggest_graph
from experiments.search.storage import open_storage
from experiments.search.study import (
    MOST_KILLED,
    State,
    begin_trial,
    note_death,
    open_study,
    run_again,
    run_all_again,
)
from experiments.search.team import MOST_DEATHS, Team, orders_for
from ktg_jax.errors import RunError

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return study_url(tmp_path)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def test_a_trial_left_before_its_graph_was_noted_is_run_again(url: str) -> None:
    config = small_search(trials=7, baselines=True)
    study = begin(url, config)
    study.ask()  # as by a worker that was killed then
    work(url, config, rising)
    trials = trials_of(url)
    assert [t.state for t in trials if t.number == 0] == ["failed"]
    assert [t.number for t in trials if t.baseline == "independent"] == [0, 6]
    assert sum(t.state in ("complete", "pruned") for t in trials) == 7


def test_a_trial_that_was_left_is_run_again_with_its_graph(url: str) -> None:
    config = small_search(trials=5)
    begin(url, config)

    def killed(graph: ktg.Graph, seed: int) -> list[float]:
        raise Killed

    with pytest.raises(Killed):
        work(url, config, killed)
    (left,) = trials_of(url)
    assert left.state == "running"
    study = open_study(open_storage(url), STUDY, config, config.space())
    run_again(study, study.get_trials()[0])
    trainer = work(url, config, rising)
    again = next(trial for trial in trials_of(url) if trial.number == 1)
    assert again.graph == left.graph
    assert trainer.trained[0] == (left.graph, 0)
    assert sum(t.state in ("complete", "pruned") for t in trials_of(url)) == 5


@pytest.mark.slow
def test_it_waits_for_what_others_run_and_takes_it_over(url: str) -> None:
    config = small_search(trials=1)
    study = begin(url, config)
    trial = study.ask()
    trial.set_user_attr("worker", "elsewhere/0")  # and never a heartbeat more
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 1
    assert [t.state for t in trials_of(url)] == ["failed", "complete"]


@pytest.mark.slow
def test_it_does_not_wait_for_ever_for_an_equivalent_graph_of_a_dead_worker(url: str) -> None:
    # All graphs are equivalent.
    one: dict[str, Any] = {"nodes": 1, "candidates": (), "gates": ("through", "correct")}
    config = small_search(trials=2, pruner="none", **one)
    study = begin(url, config)
    begin_trial(study.ask(), ktg.graphs.independent(["tiny"]), "elsewhere/0")
    trainer = PretendedTrainer(rising)
    search = worker(url, config, trainer).search
    thread = threading.Thread(target=search, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    dead, own, again = trials_of(url)
    assert [t.state for t in (dead, own, again)] == ["failed", "complete", "complete"]
    assert (own.duplicate_of, again.duplicate_of) == (None, own.number)
    assert len(trainer.trained) == 1


def test_one_that_was_taken_for_dead_goes_on_with_the_next(url: str) -> None:
    config = small_search(trials=6, pruner="none", baselines=True)
    study = begin(url, config)

    def slept(graph: ktg.Graph, seed: int) -> list[float]:
        if len(study.trials) == 6:  # those enqueued: the first time
            run_all_again(study, "here")
        return rising(graph, seed)

    trainer = work(url, config, slept)
    assert [t.state for t in trials_of(url)] == ["failed", *["complete"] * 6]
    assert [trial.reason for trial in trials_of(url)] == [None] * 7
    assert len(trainer.trained) == 7


# --- workers that are killed


def test_a_trial_that_kills_its_workers_fails_and_the_search_goes_on(url: str) -> None:
    config = small_search(trials=4, pruner="none")
    study, space, killer = begin(url, config), config.space(), ktg.graphs.mutual(["tiny", "tiny"])
    study.enqueue_trial(space.parameters(killer))
    storage = open_storage(url)

    def begin_killer(worker: str) -> None:
        trial = study.ask()
        begin_trial(trial, suggest_graph(trial, space), worker)

    for death in range(1, MOST_KILLED + 1):
        for interruption in range(4):
            begin_killer(f"here/{interruption}")
            run_all_again(study, "here")  # which counts for nothing
        begin_killer("here/0")
        assert note_death(study, storage, "here/1", 9) == 0  # another's
        assert note_death(study, storage, "here/0", 9) == (death == MOST_KILLED)
    trainer = work(url, config, rising)
    (failed,) = [trial for trial in trials_of(url) if trial.reason is not None]
    assert failed.reason == f"killed its worker {MOST_KILLED} times (signal 9)"
    assert (failed.state, failed.graph) == ("failed", killer)
    assert killer.canonical() not in [graph.canonical() for graph, _ in trainer.trained]
    assert sum(trial.state == "complete" for trial in trials_of(url)) == 3


def test_no_trial_is_lost_however_often_it_is_interrupted(url: str) -> None:
    config = small_search(trials=1)
    study = begin(url, config)
    for _ in range(25):
        begin_trial(study.ask(), ktg.graphs.mutual(["tiny", "tiny"]), "here/0")
        run_all_again(study, "here")
    (waiting,) = study.get_trials(states=(State.WAITING,))
    assert len(waiting.system_attrs["retry_history"]) == 25
    work(url, config, rising)
    assert [t.state for t in trials_of(url) if t.number == waiting.number] == ["complete"]


def test_a_trial_that_was_asked_for_by_a_worker_killed_at_once_is_not_lost(url: str) -> None:
    config = small_search(trials=2, pruner="none")
    study = begin(url, config)
    asked = study.ask()  # killed before it noted which worker has the trial
    run_all_again(study, "here")
    assert study.trials[asked.number].state == State.FAIL
    work(url, config, rising)
    assert [trial.state for trial in trials_of(url)] == ["failed", "complete", "complete"]


class Dying:
    """A worker's process that is always killed."""

    stdin = None

    def __init__(self, code: int) -> None:
        self.poll = lambda: code

    def kill(self) -> None:
        pass

    wait = kill


@pytest.mark.parametrize(("code", "number"), [(-9, 9), (143, 15)])  # 143: during its imports
def test_only_a_worker_that_ends_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, number: int
) -> None:
    monkeypatch.setattr(Team, "_start", lambda team, orders: Dying(code))
    deaths: list[tuple[str, int]] = []

    def on_death(worker: str, signal: int) -> int:
        deaths.append((worker, signal))
        return min(len(deaths) // 3, 7)  # trials that it has ended: none after the 21st death

    orders = orders_for(small_search(workers=1), "here")
    with Team(orders, tmp_path / "logs", on_death) as team:
        for _ in range(21 + MOST_DEATHS - 2):
            team.is_at_work()
        said = rf"worker 0 was killed 5 times in a row \(signal {number}\)"
        with pytest.raises(RunError, match=said):
            team.is_at_work()
    assert set(deaths) == {("here/0", number)}
