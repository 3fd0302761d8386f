"""The effects of gates: what has one, what the model finds of known ones, and how sure it is."""

from typing import Any

import numpy as np
import pytest

import ktg_jax as ktg
from experiments.search.effects import EffectsModel, terms_of
from experiments.search.samplers import make_sampler, suggest_graph
from ktg_jax import Graph, Node, SearchSpace

optuna = pytest.importorskip("optuna")

SPACE = SearchSpace(3, "cnn", ("cnn", "resnet8"), temperatures=(1.0, 4.0))


def test_terms_of_a_graph() -> None:
    teacher = Node("resnet20", "big-2", weights="runs/big")
    gates = [["linear", "correct", "through"], ["through", "correct", "cutoff"], ["cutoff"] * 3]
    terms = terms_of(Graph(["cnn", "resnet8", teacher], gates, 4.0))
    assert terms == {
        ("mean",): 1,
        ("label", "linear"): 1,
        ("sender", "learning resnet8"): 1,
        ("sender", "learning resnet8", "correct"): 1,
        ("sender", "learning resnet8", "with", "T 4"): 1,
        ("sender", "learning resnet8", "with", "label linear"): 1,
        ("sender", "teacher big"): 1,
        ("sender", "teacher big", "through"): 1,
        ("sender", "teacher big", "with", "T 4"): 1,
        ("sender", "teacher big", "with", "label linear"): 1,
        ("sender", "more than one"): 1,
        # The label is always right: correct is through.
        ("partner", "learning resnet8", "label through"): 1,
        ("partner", "learning resnet8", "target through"): 1,
    }


def test_nodes_that_the_target_does_not_need_have_no_effect() -> None:
    alone = Graph(["cnn", "resnet8"], [["through", "cutoff"], ["through", "through"]])
    assert terms_of(alone) == terms_of(Graph(["cnn"], [["correct"]]))


def made_up(rng: np.random.Generator, count: int, noise: float) -> tuple[Any, Any, Any]:
    """Trials whose values are known effects: of the label, of frozen resnet8 nodes, of seeds."""
    graphs = [SPACE.sample(rng, "roles") for _ in range(count)]
    seeds = [i % 3 for i in range(count)]
    values = [
        0.5 + value(g) + 0.01 * (s - 1) + noise * rng.normal()
        for g, s in zip(graphs, seeds, strict=True)
    ]
    return graphs, seeds, values


def value(graph: Graph) -> float:
    terms = terms_of(graph)
    linear = 0.03 * terms["sender", "frozen resnet8", "linear"]
    return 0.02 * terms["label", "linear"] + linear - 0.02 * terms["sender", "learning cnn"]


def test_known_effects_are_found() -> None:
    model = EffectsModel(*made_up(np.random.default_rng(0), 200, 0.004))
    effects = {effect.name: effect for effect in model.effects()}
    for name, expected in (
        ("label linear", 0.02),
        ("frozen resnet8 linear", 0.03),
        ("frozen resnet8 through", 0.0),
        ("learning cnn through", -0.02),
        ("learning cnn correct", -0.02),
    ):
        found = effects[name]
        assert abs(found.mean - expected) < max(3 * found.std, 0.004), name
        assert found.std < 0.006, name
    assert 0.002 < model.noise < 0.008
    assert model.of_seed(2) - model.of_seed(0) == pytest.approx(0.02, abs=0.005)
    assert model.of_seed(7) == 0


def test_more_trials_make_it_surer() -> None:
    def std(count: int) -> float:
        model = EffectsModel(*made_up(np.random.default_rng(1), count, 0.004))
        return float(np.mean([e.std for e in model.effects() if e.group == "label"]))

    assert std(150) < std(30)


def test_the_prediction_of_one_graph_is_between_its_trials_and_the_others() -> None:
    # Of one column and one value each: the posterior mean of a shrunk regression.
    alone = Graph(["cnn"], [["through"]])
    linear = Graph(["cnn"], [["linear"]])
    model = EffectsModel([alone] * 4 + [linear], [0] * 5, [0.5, 0.5, 0.5, 0.5, 0.6])
    means, stds = model.predict([alone, linear])
    assert 0.49 < means[0] < 0.52 < means[1] < 0.61
    assert 0 < stds[0] < stds[1]


def test_what_was_never_seen_is_drawn_widely() -> None:
    graphs, seeds, values = made_up(np.random.default_rng(2), 60, 0.004)
    model = EffectsModel(graphs, seeds, values)
    new = Graph(
        ["cnn", Node("resnet20", "x-1", weights="runs/x")], [["through"] * 2, ["cutoff"] * 2]
    )
    alone = Graph(["cnn"], [["through"]])
    rng = np.random.default_rng(0)
    drawn = np.array([model.thompson([alone, new], rng) for _ in range(400)])
    (_, mean), (sure, unsure) = model.predict([alone, new])
    assert unsure > 2 * sure
    assert drawn[:, 1].std() == pytest.approx(unsure, rel=0.15)
    assert drawn[:, 1].mean() == pytest.approx(mean, abs=0.2 * unsure)


def test_a_graph_that_failed_badly_does_not_hide_how_good_ones_differ() -> None:
    rng = np.random.default_rng(3)
    graphs, seeds, values = made_up(rng, 120, 0.003)
    values[5] = values[17] = 0.1  # the chance of ten classes
    effects = {e.name: e for e in EffectsModel(graphs, seeds, values).effects()}
    assert effects["frozen resnet8 linear"].mean > 0.015


def best_of(sampler: str, seed: int, trials: int = 40) -> float:
    rng = np.random.default_rng(seed)
    study = optuna.create_study(
        sampler=make_sampler(sampler, SPACE, seed, "roles"), direction="maximize"
    )
    values = []
    for _ in range(trials):
        trial = study.ask()
        graph = suggest_graph(trial, SPACE)
        values.append(value(graph))
        study.tell(trial, 0.5 + values[-1] + 0.005 * rng.normal())
    return float(np.mean(values[trials // 2 :]))


def test_proposals_are_better_than_random_ones() -> None:
    seeds = range(3)
    chosen = [best_of("effects", seed) for seed in seeds]
    random = [best_of("random", seed) for seed in seeds]
    assert min(chosen) > max(random) + 0.01


def test_graphs_that_were_tried_are_not_proposed_again() -> None:
    study = optuna.create_study(
        sampler=make_sampler("effects", SPACE, 0, "roles"), direction="maximize"
    )
    keys = []
    for _ in range(25):
        trial = study.ask()
        graph = suggest_graph(trial, SPACE)
        keys.append(graph.canonical())
        study.tell(trial, value(graph))
    assert len(set(keys[3:])) == 22
    assert not set(keys[:3]) & set(keys[3:])


def test_trials_that_are_enqueued_keep_their_graphs() -> None:
    study = optuna.create_study(
        sampler=make_sampler("effects", SPACE, 0, "roles"), direction="maximize"
    )
    graph = SPACE.graph(SPACE.parameters(ktg.graphs.mutual(["cnn", "resnet8", "cnn"], 4.0)))
    study.enqueue_trial(SPACE.parameters(graph))
    assert suggest_graph(study.ask(), SPACE) == graph
