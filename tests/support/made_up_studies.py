"""Made-up searches, for the tests of their report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import ktg_jax as ktg
from experiments.search.records import StudyRecord, TrialRecord
from ktg_jax import Graph, Node, SearchSpace
from ktg_jax.graph import named as graphs

SPACE = SearchSpace(2, "cnn", ("cnn", "resnet8"))
EPOCHS = 4
PAIR = (Node("cnn"), Node("resnet8"))
HEARING = Graph(PAIR, (("through", "linear"), ("correct", "cutoff")))
ALONE = Graph(PAIR, (("linear", "cutoff"), ("through", "through")))
MUTUAL = graphs.mutual(["cnn", "resnet8"])
REASON = 'step 3: <b>loss</b> & "more" not finite (nan)'


def make_study(*trials: TrialRecord, **fields: Any) -> StudyRecord:
    given: dict[str, Any] = {
        "path": Path("runs/a search"),
        "name": "small & <quiet>",
        "config": {"space": SPACE.describe(), "training": {"epochs": EPOCHS, "data": "digits"}},
        "command": "python -m experiments.search --nodes 2 --data 'npz:<a>.npz'",
        "space": SPACE,
        "trials": trials,
    }
    return StudyRecord(**given | fields)


def rising(epochs: int, value: float) -> dict[int, float]:
    """A curve that ends at a value."""
    return {epoch: value * epoch / epochs for epoch in range(1, epochs + 1)}


def complete(number: int, graph: Graph, value: float, **fields: Any) -> TrialRecord:
    curve = rising(EPOCHS, value)
    given = {"node_epochs": 8.0, "seconds": 60.0, "programs_compiled": 1, **fields}
    return TrialRecord(number, "complete", graph, value, curve, **given)


def small_study() -> StudyRecord:
    return make_study(
        complete(0, MUTUAL, 0.5, baseline="mutual", programs_compiled=4),
        complete(1, HEARING, 0.75),
        TrialRecord(2, "pruned", ALONE, curve={1: 0.25}, node_epochs=1.0, programs_loaded=2),
        TrialRecord(3, "complete", HEARING, 0.75, rising(EPOCHS, 0.75), duplicate_of=1),
        TrialRecord(4, "failed", ALONE, curve={1: 0.2, 2: 0.1}, reason=REASON, node_epochs=2.0),
        TrialRecord(5, "running", ALONE, curve={1: 0.3}, node_epochs=1.0),
        TrialRecord(6, "failed", None, reason="the worker died"),
        complete(7, ALONE, 0.625, node_epochs=4.0),
    )


def ended_study() -> StudyRecord:
    """The small one with a fair ending; the second graph that was found is mutual learning."""
    study = small_study()
    tested = {1: {"cnn-0": 0.71, "resnet8-1": 0.6825}}
    return replace(study, results=results_of(study), tested=tested)


def results_of(study: StudyRecord) -> Mapping[str, Any]:
    values = {trial.number: trial.value for trial in study.trials}

    def entry(
        name: str, trial: int | None, accuracies: list[float], stands_for: str | None = None
    ) -> dict[str, Any]:
        graph = {"nodes": [{"model": "cnn"}, {"model": "resnet8"}], "gates": MUTUAL.gates}
        return {
            "name": name,
            "kind": name.split("-")[0],
            "stands_for": stands_for,
            "trial": trial,
            "graph": graph,
            "val_accuracy": None if trial is None else values[trial],
            "accuracies": accuracies,
            "mean": float(np.mean(accuracies)),
            "std": float(np.std(accuracies, ddof=1)),
        }

    def comparison(baseline: str, kind: str, **numbers: float | None) -> dict[str, Any]:
        names = {"entry": "found-1", "baseline": baseline, "baseline_kind": kind}
        return {**names, "difference": -0.0125, **numbers}

    known = {"low": -0.03, "high": 0.005, "p": 0.0625, "p_holm": 0.125}
    return {
        "seeds": [0, 1],
        "entries": [
            entry("found-1", 1, [0.70, 0.72]),
            entry("found-0", 0, [0.73, 0.715], "mutual"),
            entry("independent", None, [0.73, 0.715]),
        ],
        "comparisons": [
            comparison("found-0", "mutual", **known),
            comparison("independent", "independent", **dict.fromkeys(known)),
        ],
    }


def large_study(num_nodes: int, num_trials: int, epochs: int) -> StudyRecord:
    candidates = ("cnn", "resnet8") if num_nodes > 1 else ()
    space = SearchSpace(num_nodes, "cnn", candidates, ktg.GATES)
    rng = np.random.default_rng(0)
    trials = []
    for i in range(num_trials):
        value, graph = float(rng.uniform(0.5, 0.9)), space.sample(rng)
        if i % 3:
            curve = rising(int(rng.integers(1, epochs)), value)
            trials.append(TrialRecord(i, "pruned", graph, None, curve, node_epochs=3.0))
        else:
            curve = rising(epochs, value)
            trials.append(TrialRecord(i, "complete", graph, value, curve, node_epochs=9.0))
    return make_study(*trials, space=space, config={"training": {"epochs": epochs}})
