"""Samplers: which graphs trials get, alone, in several workers, enqueued and after a restart."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import GATES, Graph, InputError, SearchSpace

optuna = pytest.importorskip("optuna")

from experiments.search.pruners import make_pruner  # noqa: E402
from experiments.search.samplers import make_sampler, suggest_graph  # noqa: E402

SPACE = SearchSpace(3, "cnn", ("cnn", "resnet8", "wrn10_2"), GATES[:4], (1.0, 4.0))
SMALL = SearchSpace(2, "cnn", ("cnn", "resnet8"), ("through", "cutoff"))
NAMES = ("effects", "random", "tpe")
Worker = tuple[Any, SearchSpace]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(level)


def study_of(name: str, space: SearchSpace, seed: int = 0, **options: Any) -> Any:
    """A study, or one in the `storage` that is given as another process loads it."""
    return optuna.create_study(
        study_name="study",
        sampler=make_sampler(name, space, seed),
        direction="maximize",
        load_if_exists=True,
        **options,
    )


def run(
    study: Any, space: SearchSpace, trials: int, value: Callable[[Graph], float]
) -> list[Graph]:
    graphs = []
    for _ in range(trials):
        trial = study.ask()
        graphs.append(suggest_graph(trial, space))
        study.tell(trial, value(graphs[-1]))
    return graphs


def num_cut(graph: Graph) -> float:
    return float(graph.gates[0].count("cutoff"))


def chi_square(counts: Counter[Any], num_kinds: int) -> float:
    expected = counts.total() / num_kinds
    missing = num_kinds - len(counts)
    return sum((n - expected) ** 2 for n in counts.values()) / expected + missing * expected


def test_random_trials_are_uniform_over_the_valid_graphs() -> None:
    graphs = run(study_of("random", SMALL), SMALL, 960, num_cut)
    counts = Counter(graphs)
    assert len(counts) == SMALL.size() == 24
    assert chi_square(counts, 24) < 49.7  # 23 degrees of freedom: 1 in 1000 is above


def test_random_trials_are_those_of_the_space() -> None:
    graphs = run(study_of("random", SPACE, seed=7), SPACE, 5, num_cut)
    assert graphs == [SPACE.sample(np.random.default_rng([7, number])) for number in range(5)]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_all_graphs(name: str) -> None:
    first, same, other = (run(study_of(name, SPACE, s), SPACE, 15, num_cut) for s in (1, 1, 2))
    assert first == same
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len(set(first)) == 15


@pytest.mark.parametrize("name", NAMES)
def test_several_workers_draw_what_one_would(name: str) -> None:
    alone = run(study_of(name, SPACE), SPACE, 20, num_cut)
    storage = optuna.storages.InMemoryStorage()
    study = study_of(name, SPACE, storage=storage)
    workers = [study, study_of(name, SPACE, storage=storage)]
    shared = [run(workers[i % 2], SPACE, 1, num_cut)[0] for i in range(20)]
    assert shared == alone


@pytest.mark.parametrize("name", NAMES)
def test_workers_at_the_same_time_draw_different_graphs(name: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = study_of(name, SPACE, storage=storage)
    run(study, SPACE, 12, num_cut)
    workers = [study_of(name, SPACE, storage=storage) for _ in range(4)]
    trials = [worker.ask() for worker in workers]
    assert len({suggest_graph(trial, SPACE) for trial in trials}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_that_starts_again_goes_on_where_it_was(name: str) -> None:
    whole = run(study_of(name, SPACE), SPACE, 16, num_cut)
    storage = optuna.storages.InMemoryStorage()
    study = study_of(name, SPACE, storage=storage)
    begun = run(study, SPACE, 13, num_cut)
    assert begun + run(study_of(name, SPACE, storage=storage), SPACE, 3, num_cut) == whole


def test_tpe_begins_uniformly_and_then_finds_what_is_good() -> None:
    def likeness(graph: Graph) -> float:
        same = sum(gate == "linear" for row in graph.gates for gate in row)
        return same + (graph.nodes[1].model == "resnet8") + (graph.temperature == 4.0)

    drawn = {name: run(study_of(name, SPACE), SPACE, 80, likeness) for name in NAMES}
    assert drawn["tpe"][:10] == drawn["random"][:10]
    assert drawn["tpe"][10] != drawn["random"][10]
    late = {name: np.mean([likeness(graph) for graph in drawn[name][50:]]) for name in NAMES}
    # 9 gates of 4, a model of 3 and a temperature of 2: 3.1 by chance, 11 at best.
    assert late["random"] < 4
    assert late["tpe"] > 6


def test_tpe_that_seeks_cut_edges_draws_valid_graphs() -> None:
    # `suggest_graph` would raise InputError for a graph whose target hears nobody.
    graphs = run(study_of("tpe", SMALL), SMALL, 60, num_cut)
    assert Counter(num_cut(graph) for graph in graphs[30:])[1.0] > 20


def test_a_target_that_hears_nobody_gets_one_of_the_valid_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_cut(self: Any, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {**dict.fromkeys(search_space, "cutoff"), "node1.model": "resnet8"}

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", all_cut)
    graphs = run(study_of("tpe", SMALL), SMALL, 300, num_cut)
    assert {(graph.nodes[1].model, graph.gates[1]) for graph in graphs} == {
        ("resnet8", ("cutoff", "cutoff"))
    }
    rows = Counter(graph.gates[0] for graph in graphs)
    assert chi_square(rows, 3) < 13.8  # 2 degrees of freedom: 1 in 1000 is above


@pytest.mark.parametrize("name", NAMES)
def test_an_enqueued_graph_is_tried_first(name: str) -> None:
    study = study_of(name, SPACE)
    baseline = ktg.graphs.mutual(["cnn", "wrn10_2", "resnet8"], 4.0)
    study.enqueue_trial(SPACE.parameters(baseline))
    graphs = run(study, SPACE, 3, num_cut)
    assert graphs[0] == baseline
    assert baseline not in graphs[1:]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_killed_trial_had_drawn_is_kept_and_made_valid(name: str) -> None:
    # A worker that dies while it writes its parameters leaves some of them, to be tried again.
    study = study_of(name, SMALL)
    for _ in range(30):
        study.enqueue_trial({"node1.model": "resnet8", "gate.0.0": "cutoff"})
    for graph in run(study, SMALL, 30, num_cut):
        assert graph.nodes[1].model == "resnet8"
        assert graph.gates[0] == ("cutoff", "through")


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_enqueued_graph_is_refused(name: str) -> None:
    study = study_of(name, SMALL)
    study.enqueue_trial({"gate.0.0": "cutoff", "gate.0.1": "cutoff"})
    with pytest.raises(InputError, match=r"gates\[0\]: got .* not cutoff"):
        suggest_graph(study.ask(), SMALL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "space",
    [SearchSpace(1, "cnn", (), ("linear",)), SearchSpace(1, "cnn", (), ("through", "cutoff"))],
    ids=["no choice", "one valid graph"],
)
def test_the_smallest_spaces_are_drawn_from(name: str, space: SearchSpace) -> None:
    graphs = run(study_of(name, space), space, 20, num_cut)
    assert len(set(graphs)) == space.size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_trials_keep_all_parameters(name: str) -> None:
    study = study_of(name, SPACE)
    graphs = run(study, SPACE, 12, num_cut)
    assert [SPACE.graph(trial.params) for trial in study.trials] == graphs
    assert study.best_trial.params.keys() == SPACE.choices().keys()


@pytest.mark.parametrize("name", NAMES)
def test_other_parameters_can_be_asked_for(name: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        trial = study_of(name, SMALL, seed).ask()
        graph = suggest_graph(trial, SMALL)
        drawn.append(
            (trial.suggest_float("rate", 0.0, 1.0), trial.suggest_float("decay", 0.0, 1.0))
        )
        assert SMALL.parameters(graph).items() <= trial.params.items()
    assert drawn[0] == drawn[1]
    assert len({drawn[0][0], drawn[0][1], drawn[2][0], drawn[2][1]}) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pruner", ["hyperband", "asha"])
def test_samplers_work_with_pruners(name: str, pruner: str) -> None:
    study = study_of(name, SPACE, pruner=make_pruner(pruner, epochs=8))
    pruned = 0
    for _ in range(60):
        trial = study.ask()
        value = num_cut(suggest_graph(trial, SPACE))
        for epoch in range(1, 9):
            trial.report(value + epoch / 100, epoch)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                pruned += 1
                break
        else:
            study.tell(trial, value)
    assert 5 < pruned < 55


@pytest.mark.parametrize("name", ["grid", "", None, "TPE"])
def test_an_unknown_sampler_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"sampler: got .*; allowed: effects, random, tpe"):
        make_sampler(name, SMALL, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed: got .*; allowed: an integer, 0 or above"):
        make_sampler("random", SMALL, seed)


@pytest.mark.parametrize("module", ["samplers", "pruners"])
def test_without_optuna_the_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for loaded in ("extra", module):
        monkeypatch.delitem(sys.modules, f"experiments.search.{loaded}", raising=False)
    with pytest.raises(InputError, match=r'search: .*; allowed: .* "ktg_jax\[search\]"'):
        importlib.import_module(f"experiments.search.{module}")
