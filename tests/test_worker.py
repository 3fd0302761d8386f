"""Workers: as many trials as asked for, equivalent ones once, failures noted, none run twice."""

import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from searches import (
    STUDY,
    PretendedTrainer,
    begin,
    small_search,
    study_url,
    trials_of,
    work,
    worker,
)

import ktg_jax as ktg
from experiments.searching.storage import open_storage
from experiments.searching.study import begin_trial, open_study, run_again
from experiments.searching.worker import MOST_FAILURES
from ktg_jax.errors import RunError
from ktg_jax.search.engine import optuna

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


def rising(graph: ktg.Graph, seed: int) -> list[float]:
    """Better with every epoch, and with every gate that is open."""
    open_gates = sum(gate != "cutoff" for row in graph.gates for gate in row)
    return [(open_gates + epoch / 10) / 10 for epoch in (1, 2, 3)]


# --- how many


def test_there_are_exactly_as_many_trials_as_asked_for(url: str) -> None:
    def slowly(graph: ktg.Graph, seed: int) -> list[float]:
        time.sleep(0.02)
        return rising(graph, seed)

    config = small_search(trials=11, pruner="none")
    trainer = work(url, config, slowly, workers=3)
    trials = trials_of(url)
    assert [trial.number for trial in trials] == list(range(11))
    assert all(trial.state == "complete" for trial in trials)
    keys = Counter(graph.canonical() for graph, _ in trainer.trained)
    assert set(keys.values()) == {1}
    assert len(keys) == sum(trial.duplicate_of is None for trial in trials)


def test_the_same_search_with_more_trials_goes_on(url: str) -> None:
    work(url, small_search(trials=4), rising)
    before = trials_of(url)
    work(url, small_search(trials=4), rising)
    assert trials_of(url) == before
    work(url, small_search(trials=7), rising)
    assert trials_of(url)[:4] == before
    assert len(trials_of(url)) == 7


def test_the_baselines_are_the_first(url: str) -> None:
    work(url, small_search(trials=5, pruner="none"), rising)
    trials = trials_of(url)
    assert [trial.baseline for trial in trials] == [
        "independent",
        "mutual",
        "distillation",
        None,
        None,
    ]
    graphs = [trial.graph for trial in trials[:3]]
    assert graphs == [
        ktg.graphs.independent(["tiny", "tiny"]),
        ktg.graphs.mutual(["tiny", "tiny"]),
        ktg.graphs.distillation("tiny", "tiny"),
    ]


def test_nothing_begins_after_the_deadline(url: str) -> None:
    config = small_search()
    begin(url, config)
    trainer = PretendedTrainer(rising)
    worker(url, config, trainer, deadline=time.time() - 1).search()
    assert not trainer.trained
    assert not trials_of(url)


# --- equivalent graphs


def test_equivalent_graphs_are_trained_once(url: str) -> None:
    # One node: through and correct are the same, cutoff is not allowed: two graphs.
    config = small_search(nodes=1, candidates=(), trials=8, pruner="none")
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 2
    trials = trials_of(url)
    first = {trial.number: trial for trial in trials if trial.duplicate_of is None}
    assert len(first) == 2
    for trial in trials:
        if trial.duplicate_of is not None:
            original = first[trial.duplicate_of]
            assert trial.graph is not None
            assert original.graph is not None
            assert trial.graph.equivalent(original.graph)
            assert (trial.value, trial.curve) == (original.value, original.curve)
            assert trial.node_epochs == 0


def test_those_drawn_at_the_same_time_wait_for_the_first(url: str) -> None:
    def slowly(graph: ktg.Graph, seed: int) -> list[float]:
        time.sleep(0.5)
        return rising(graph, seed)

    config = small_search(nodes=1, candidates=(), trials=6, pruner="none", baselines=False)
    trainer = work(url, config, slowly, workers=3)
    assert len(trainer.trained) <= 2
    assert len({graph.canonical() for graph, _ in trainer.trained}) == len(trainer.trained)
    assert all(trial.state == "complete" for trial in trials_of(url))


def test_one_that_was_pruned_prunes_its_equivalents(url: str) -> None:
    def linear_is_bad(graph: ktg.Graph, seed: int) -> list[float]:
        return [0.1, 0.1, 0.1] if graph.gates == (("linear",),) else [0.8, 0.85, 0.9]

    config = small_search(nodes=1, candidates=(), trials=8)
    work(url, config, linear_is_bad)
    linear = [t for t in trials_of(url) if t.graph is not None and t.graph.gates == (("linear",),)]
    assert len(linear) >= 2
    assert {trial.state for trial in linear} == {"pruned"}
    assert {tuple(trial.curve.items()) for trial in linear} == {((1, 0.1),)}


def test_on_request_they_are_trained_with_other_seeds(url: str) -> None:
    config = small_search(
        nodes=1, candidates=(), trials=6, pruner="none", duplicates="retrain", seed=5
    )
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 6
    seeds: dict[ktg.Graph, list[int]] = {}
    for graph, seed in trainer.trained:
        seeds.setdefault(graph.canonical(), []).append(seed)
    for of_graph in seeds.values():
        assert of_graph == list(range(5, 5 + len(of_graph)))


# --- failures


def test_a_failed_trial_is_noted_and_the_search_goes_on(url: str) -> None:
    def mutual_diverges(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        if graph == ktg.graphs.mutual(["tiny", "tiny"]):
            return [0.5, RunError("step 9, node tiny-0:\nloss not finite")]
        return [*rising(graph, seed)]

    work(url, small_search(trials=6), mutual_diverges)
    trials = trials_of(url)
    assert len(trials) == 6
    assert [trial.number for trial in trials if trial.state == "failed"] == [1]
    assert trials[1].reason == "step 9, node tiny-0: loss not finite"
    assert trials[1].curve == {1: 0.5}
    assert trials[1].value is None
    assert trials[1].node_epochs == 2


def test_equivalents_of_a_failed_trial_fail_as_it_did(url: str) -> None:
    def linear_diverges(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        if graph.gates == (("linear",),):
            return [RunError("diverged")]
        return [*rising(graph, seed)]

    config = small_search(nodes=1, candidates=(), trials=8, pruner="none")
    trainer = work(url, config, linear_diverges)
    assert len(trainer.trained) == 2
    failed = [trial for trial in trials_of(url) if trial.state == "failed"]
    assert len(failed) >= 2
    assert failed[0].reason == "diverged"
    assert {t.reason for t in failed[1:]} == {f"as trial {failed[0].number}: diverged"}


def test_many_failures_in_a_row_end_the_search(url: str) -> None:
    numbers = itertools.count()

    def failing(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [MemoryError(f"number {next(numbers)}")]

    with pytest.raises(RunError, match=f"{MOST_FAILURES} trials in a row failed.*number 4"):
        work(url, small_search(trials=30), failing)
    assert sum(t.duplicate_of is None for t in trials_of(url)) == MOST_FAILURES


def test_failures_between_successes_do_not(url: str) -> None:
    numbers = itertools.count()

    def every_second(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [RunError("no") if next(numbers) % 2 else 0.5]

    work(url, small_search(trials=15, gates=ktg.GATES), every_second)
    assert len(trials_of(url)) == 15


def test_a_full_disk_is_no_failure_of_a_graph(url: str) -> None:
    def full(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [OSError(28, "No space left on device")]

    with pytest.raises(OSError, match="No space left"):
        work(url, small_search(), full)
    assert [trial.reason for trial in trials_of(url)] == [None]


# --- workers that are gone


def test_a_trial_left_before_its_graph_was_noted_is_run_again(url: str) -> None:
    config = small_search(trials=4)
    study = begin(url, config)
    study.ask()  # as by a worker that was killed then
    work(url, config, rising)
    trials = trials_of(url)
    assert [t.state for t in trials if t.number == 0] == ["failed"]
    assert [t.number for t in trials if t.baseline == "independent"] == [0, 3]
    assert sum(t.state in ("complete", "pruned") for t in trials) == 4


def test_a_trial_that_was_left_is_run_again_with_its_graph(url: str) -> None:
    config = small_search(trials=5, baselines=False)
    begin(url, config)

    class Killed(BaseException):
        """As nothing catches it."""

    def killed(graph: ktg.Graph, seed: int) -> list[float]:
        raise Killed

    with pytest.raises(Killed):
        work(url, config, killed)
    (left,) = trials_of(url)
    assert left.state == "running"
    study = open_study(open_storage(url, 1), STUDY, config, config.space())
    run_again(study, study.get_trials()[0])
    trainer = work(url, config, rising)
    again = next(trial for trial in trials_of(url) if trial.number == 1)
    assert again.graph == left.graph
    assert trainer.trained[0] == (left.graph, 0)
    assert sum(t.state in ("complete", "pruned") for t in trials_of(url)) == 5


def test_it_waits_for_what_others_run_and_takes_it_over(url: str) -> None:
    config = small_search(trials=1)
    study = begin(url, config)
    trial = study.ask()
    trial.set_user_attr("worker", "elsewhere/0")  # and never a heartbeat more
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 1
    assert [t.state for t in trials_of(url)] == ["failed", "complete"]


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
