"""The race over seeds: who takes part, who goes on, and what is left of the budget."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers its models)
from searches import (
    STUDY,
    Killed,
    PretendedTrainer,
    begin,
    small_search,
    study_url,
    trials_of,
    work,
    worker,
)

import ktg_jax as ktg
from experiments.search.baselines import baselines
from experiments.search.extra import optuna
from experiments.search.plan import reserved
from experiments.search.race import Entrant, key_of, race, trainings
from experiments.search.records import TrialRecord, standings, values_of
from experiments.search.storage import open_storage
from experiments.search.study import race_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning"),
]


def alone(gate: str, model: str = "cnn") -> ktg.Graph:
    return ktg.Graph([model], [[gate]])


A, B, C, D = (alone("through"), alone("linear"), alone("negative_linear"), alone("through", "mlp"))
ENTRANTS = [Entrant(graph, "trials") for graph in (A, B, C, D)]


def values(*of_graphs: list[float]) -> dict[str, dict[int, float]]:
    """Of A, B, ... by seed, from 0."""
    graphs = (A, B, C, D)[: len(of_graphs)]
    return {
        key_of(graph): dict(enumerate(of_graph))
        for graph, of_graph in zip(graphs, of_graphs, strict=True)
    }


def test_a_round_wants_the_seeds_that_are_missing() -> None:
    stands = race(ENTRANTS, values([0.5], [0.6, 0.6], [0.4] * 3, []), 0)
    assert not stands.rounds
    assert stands.wanted == ((3, 0), (0, 1), (3, 1), (0, 2), (1, 2), (3, 2))
    assert stands.ranking == []


def test_the_better_half_goes_on_by_the_mean_of_the_seeds_that_all_have() -> None:
    # B has the best score of all with seed 3, which the others have not: it does not count yet.
    known = values([0.5, 0.7, 0.6], [0.4, 0.4, 0.4, 0.99], [0.6, 0.6, 0.3], [0.55] * 3)
    stands = race(ENTRANTS, known, 0)
    (first,) = stands.rounds
    assert first.seeds == (0, 1, 2)
    assert first.means == pytest.approx({0: 0.6, 1: 0.4, 2: 0.5, 3: 0.55})
    assert first.kept == (0, 3)
    assert stands.wanted == ((0, 3), (3, 3), (0, 4), (3, 4))
    assert [(i, seeds) for i, _, seeds in stands.ranking] == [(0, 3), (3, 3), (2, 3), (1, 3)]


def test_it_ends_with_one_and_then_goes_on_a_seed_at_a_time() -> None:
    known = values([0.6] * 3 + [0.1, 0.1], [0.4] * 3, [0.5] * 3, [0.55] * 5)
    stands = race(ENTRANTS, known, 0)
    assert [each.kept for each in stands.rounds] == [(0, 3), (3,)]
    assert stands.ranking[0] == (3, pytest.approx(0.55), 5)
    assert stands.ranking[1] == (0, pytest.approx(0.4), 5)
    assert stands.wanted == ((0, 5), (3, 5))
    more = values([0.6] * 3 + [0.1, 0.1, 1.0], [0.4] * 3, [0.5] * 3, [0.55] * 5 + [0.0])
    again = race(ENTRANTS, more, 0)
    assert again.ranking[0] == (0, pytest.approx(0.5), 6)


def test_seeds_begin_at_those_of_the_search_and_take_their_turns() -> None:
    stands = race(ENTRANTS[:2], {}, 7, in_turn=4)
    assert sorted({seed for _, seed in stands.wanted}) == [7, 8, 9, 10]


def test_trainings_are_counted() -> None:
    assert trainings(4, 0) == 4 * 2 + 2 * 2
    assert trainings(4, 2) == 14
    assert trainings(2, 0) == 4
    assert trainings(8, 0, in_turn=5) == 8 * 4 + 2 * 4 + 2 * 2


def record(
    number: int, graph: ktg.Graph, value: float | None, seed: int | None, **known: Any
) -> Any:
    state = "failed" if value is None else "complete"
    return TrialRecord(number, state, graph, value, seed=seed, **known)


def test_values_are_those_of_trained_trials() -> None:
    trials = [
        record(0, A, 0.5, 0),
        record(1, A, 0.6, 1),
        record(2, alone("correct"), 0.9, 2, duplicate_of=0),  # has the values of the first
        record(3, B, None, 0, reason="a loss is not finite"),
        record(4, C, None, 0),  # interrupted
        record(5, C, 0.4, None),  # from before seeds were noted
    ]
    assert values_of(trials) == {key_of(A): {0: 0.5, 1: 0.6}, key_of(B): {0: 0.0}}


def test_who_raced_stands_before_who_had_one_lucky_score() -> None:
    trials = [record(i, graph, 0.5, 0) for i, graph in enumerate((A, B))]
    trials += [record(2, C, 0.99, 0)]
    trials += [
        record(3 + i, graph, 0.6 + 0.1 * i, s) for i, graph in enumerate((A, B)) for s in (1, 2)
    ]
    assert standings(trials)[0].trial.number == 2
    found = race(ENTRANTS[:2], values_of(trials), 0)
    ranked = standings(trials, found)
    assert [each.trial.number for each in ranked] == [1, 0, 2]
    assert (ranked[0].value, ranked[0].seeds) == (pytest.approx((0.5 + 0.7 + 0.7) / 3), 3)


def gates_open(graph: ktg.Graph, seed: int) -> list[float]:
    """Better with every open gate of the target, and with luck that a seed and a graph have."""
    luck = np.random.default_rng([seed, len(graph.to_json())]).normal()
    return [0.3 + 0.1 * sum(gate != "cutoff" for gate in graph.gates[0]) + 0.01 * luck]


RACING: dict[str, Any] = {
    "nodes": 3,
    "epochs": 1,
    "pruner": "none",
    "trial_seeds": 2,
    "race": 4,
    "draw": "roles",
}


@pytest.mark.parametrize("sampler", ["effects", "random"])
def test_a_search_ends_with_a_race(sampler: Any, tmp_path: Path) -> None:
    config = small_search(sampler=sampler, trials=30, **RACING)
    graphs, of_race = reserved(config, config.space())
    assert (graphs, of_race) == (4, trainings(4, 2 if sampler == "effects" else 0, 2))
    trainer = work(study_url(tmp_path), config, gates_open, workers=2)
    trials = trials_of(study_url(tmp_path))
    assert len(trials) == 30
    raced = [trial for trial in trials if trial.race is not None]
    assert [trial.number for trial in raced] == list(range(30 - len(raced), 30))
    assert len(raced) == of_race
    drawn = trials[: 30 - of_race]
    assert {trial.seed for trial in drawn} == {0, 1}
    assert all(trial.seed == trial.number % 2 for trial in drawn)
    counts = Counter((graph.canonical(), seed) for graph, seed in trainer.trained)
    assert max(counts.values()) == 1  # no graph twice with one seed
    study = optuna.load_study(study_name=STUDY, storage=open_storage(study_url(tmp_path)))
    stands = race_of(study, trials)
    assert stands is not None
    assert len(stands.rounds) >= 2
    by = {entrant.by for entrant in stands.entrants}
    assert by == ({"model", "trials"} if sampler == "effects" else {"trials"})
    best = standings(trials, stands)[0]
    assert sum(gate != "cutoff" for gate in best.graph.gates[0]) == 3
    assert best.seeds >= 5


def test_no_race_without_one(tmp_path: Path) -> None:
    config = small_search(trials=8, **RACING | {"race": 0})
    work(study_url(tmp_path), config, gates_open)
    assert all(trial.race is None for trial in trials_of(study_url(tmp_path)))


def test_a_killed_training_of_the_race_is_run_again_with_its_seed(tmp_path: Path) -> None:
    url, config = study_url(tmp_path), small_search(trials=20, **RACING)
    before = 20 - reserved(config, config.space()).trials
    calls = iter(range(1000))

    def killing(graph: ktg.Graph, seed: int) -> list[float]:
        if next(calls) == before + 2:
            raise Killed
        return gates_open(graph, seed)

    begin(url, config)
    with pytest.raises(Killed):
        worker(url, config, PretendedTrainer(killing)).search()
    work(url, config, gates_open)
    known = [trial for trial in trials_of(url) if not trial.is_interrupted]
    assert len(known) == 20
    whole = study_url(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    work(whole, config, gates_open)

    def told(url: str) -> set[Any]:
        return {(t.graph, t.seed, t.race, t.value) for t in trials_of(url) if t.value is not None}

    assert told(url) == told(whole)


def test_with_more_trials_the_search_goes_on_and_races_anew(tmp_path: Path) -> None:
    url = study_url(tmp_path)
    work(url, small_search(trials=20, **RACING), gates_open)
    work(url, small_search(trials=40, **RACING), gates_open)
    trials = trials_of(url)
    assert len(trials) == 40
    rounds = [trial.race is not None for trial in trials]
    assert rounds[19]
    assert not rounds[20]
    assert rounds[39]


def test_a_small_budget_leaves_half_of_it_to_new_graphs() -> None:
    config = small_search(trials=16, baselines=True, **RACING)
    designed = len(baselines(config.space()))
    assert designed == 9
    assert reserved(config, config.space()) == (0, 0)  # the smallest race takes 4 of 7
    more = dataclasses.replace(config, trials=17)
    assert reserved(more, config.space()) == (2, 4)
    most = dataclasses.replace(config, trials=100)
    assert reserved(most, config.space()) == (4, trainings(4, 0, 2))
