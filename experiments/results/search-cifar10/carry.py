"""Carries the found graph elsewhere: `python experiments/results/search-cifar10/carry.py WHERE`.

WHERE is `resnet14`, another target on the same data with the same teacher, or `digits` or
`tiny_imagenet`, other data, on which the teacher is trained first. To be run in a checkout's root,
with `data` there. Trains graphs of the fair ending of `search/`, five seeds each, compares them and
writes `carried/WHERE.json`. The same command goes on; started twice at once, it shares the work.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

import ktg_jax as ktg
from experiments.comparison import Contender, compare
from experiments.runs import cli
from experiments.runs.config import TrainConfig
from experiments.runs.graphs import PRETRAINED
from experiments.runs.process import prepare
from experiments.runs.workdir import Workdir
from experiments.search.retraining import retrain
from experiments.search.tables import markdown

HERE = Path(__file__).parent
SEEDS = range(5)
BASELINES = ("independent", "control", "designed")
OTHER_DATA: dict[str, Any] = {"val_fraction": 0.0, "target": "resnet8", "is_own": False}
CIFAR10: dict[str, Any] = {
    "data": "cifar10",
    "data_dir": "data",
    "train_limit": 10_000,
    "val_fraction": 0.0,
}
PLACES: dict[str, dict[str, Any]] = {
    "resnet14": {**CIFAR10, "epochs": 10, "target": "resnet14", "is_own": True},
    "digits": {**OTHER_DATA, "data": "digits", "train_limit": 200, "epochs": 30},
    "tiny_imagenet": {
        **OTHER_DATA,
        "data": "tiny_imagenet",
        "data_dir": "data/tiny-imagenet-200",
        "image_size": 32,
        "epochs": 40,
    },
}
"""How the graphs are trained: options of a training, the target's model, and whether the teacher's
own weights are used."""


def carried(graph: ktg.Graph, target: str, is_own: bool) -> ktg.Graph:
    """The graph with another target, and, on other data, with teachers that are trained there."""
    nodes = [dataclasses.replace(graph.nodes[0], model=target), *graph.nodes[1:]]
    for i in () if is_own else graph.frozen:
        nodes[i] = dataclasses.replace(nodes[i], weights=PRETRAINED, input=None)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def runs_of(name: str, graph: ktg.Graph, where: str) -> list[TrainConfig]:
    """The trainings of a graph, one a seed."""
    folder, options = Path("runs/carried") / where, dict(PLACES[where])
    target, is_own = options.pop("target"), options.pop("is_own")
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    carried(graph, target, is_own).save(file)
    order = 0 if is_own else None  # one for all seeds, so that the teacher is recorded once
    return [
        TrainConfig(
            **options,
            graph=str(file),
            seed=seed,
            data_seed=order,
            workdir=str(folder / name / f"seed-{seed}"),
        )
        for seed in SEEDS
    ]


def accuracy(run: TrainConfig) -> float:
    """Of the target on the test images."""
    result = Workdir(str(run.workdir)).result
    assert result is not None
    return result["target"]["test_accuracy"]


def main() -> None:
    """Does it."""
    where = sys.argv[1]
    prepare(True)
    entries = json.loads((HERE / "search" / "results.json").read_text())["entries"]
    first = next(entry for entry in entries if entry["kind"] == "found")
    chosen = [first, *(entry for entry in entries if entry["kind"] in BASELINES)]
    graphs = {e["name"]: ktg.Graph.from_json(json.dumps(e["graph"])) for e in chosen}
    runs = {name: runs_of(name, graph, where) for name, graph in graphs.items()}
    by_seed = zip(*runs.values(), strict=True)
    listed = [dataclasses.asdict(run) for of_seed in by_seed for run in of_seed]
    retrain(listed, jax.local_devices()[0], Path("runs/carried") / where / "recordings")
    found, *others = graphs
    contenders = [
        Contender(name, "found" if name == found else name, graph) for name, graph in graphs.items()
    ]
    contenders[0] = dataclasses.replace(contenders[0], baselines=tuple(others))
    accuracies = {name: list(map(accuracy, of_graph)) for name, of_graph in runs.items()}
    results = compare(contenders, accuracies, list(SEEDS))
    (HERE / "carried").mkdir(exist_ok=True)
    (HERE / "carried" / f"{where}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
