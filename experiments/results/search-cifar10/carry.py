"""Carries the found graph elsewhere: `python experiments/results/search-cifar10/carry.py WHERE`.

WHERE is `resnet14`, another target on the same data with the same teacher, or other data: `digits`
or `tiny_imagenet`, where the teacher is trained on the student's own images first, or
`digits-unseen` or `tiny_imagenet-unseen`, where it is trained on those that the student does not
use, as in the search. To be run in a checkout's root, with `data` there. Trains graphs of the fair
ending of `search/`, five seeds each, compares them and writes `carried/WHERE.json`. The same
command goes on; started twice at once, it shares the work.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ktg_jax as ktg
from experiments.comparison import Contender, compare
from experiments.runs import cli
from experiments.runs.config import TrainConfig
from experiments.runs.console import make_console
from experiments.runs.graphs import PRETRAINED
from experiments.runs.locks import turn
from experiments.runs.process import prepare
from experiments.runs.workdir import Workdir
from experiments.search.retraining import retrain
from experiments.search.tables import markdown
from experiments.train import train as train_run
from ktg_jax.data.sources import load_dataset

HERE = Path(__file__).parent
SEEDS = range(5)
BASELINES = ("independent", "control", "designed")
CIFAR10: dict[str, Any] = {"data": "cifar10", "data_dir": "data", "train_limit": 10_000}
DIGITS: dict[str, Any] = {"data": "digits", "train_limit": 200, "epochs": 30}
TINY: dict[str, Any] = {
    "data": "tiny_imagenet",
    "data_dir": "data/tiny-imagenet-200",
    "image_size": 32,
    "epochs": 40,
}
PLACES: dict[str, dict[str, Any]] = {
    "resnet14": {**CIFAR10, "epochs": 10},
    "digits": DIGITS,
    "digits-unseen": DIGITS,
    "tiny_imagenet": TINY,
    "tiny_imagenet-unseen": {**TINY, "train_limit": 300, "epochs": 100},
}
"""How the graphs are trained, on all images that the limit leaves."""


def carried(graph: ktg.Graph, where: str) -> ktg.Graph:
    """The graph with another target, or on other data with a teacher that is trained there."""
    target, *others = graph.nodes
    if where == "resnet14":
        return dataclasses.replace(graph, nodes=(dataclasses.replace(target, model=where), *others))
    source = str(teacher(where)) if where.endswith("-unseen") else PRETRAINED
    nodes = [
        node if node.weights in (None, PRETRAINED) else dataclasses.replace(node, weights=source)
        for node in graph.nodes
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def teacher(where: str) -> Path:
    """The run of a `resnet20` on the training images that the student does not use."""
    folder = (Path("runs/carried") / where).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with turn(folder / "teacher.lock"):
        if Workdir(str(folder / "teacher")).result is None:
            options = {k: v for k, v in PLACES[where].items() if k not in ("epochs", "data")}
            student = load_dataset(PLACES[where]["data"], val_fraction=0.0, **options)
            del options["train_limit"]
            full = load_dataset(PLACES[where]["data"], val_fraction=0.0, **options)
            used = {image.tobytes() for image in student.train.images}
            others = [i for i, image in enumerate(full.train.images) if image.tobytes() not in used]
            train, test = full.train.take(np.array(others)), full.test
            assert test is not None
            np.savez(
                folder / "others.npz",
                train_images=train.images,
                train_labels=train.labels,
                test_images=test.images,
                test_labels=test.labels,
            )
            config = TrainConfig(
                graph="independent",
                models=("resnet20",),
                data=f"npz:{folder / 'others.npz'}",
                val_fraction=0.0,
                epochs=PLACES[where]["epochs"],
                schedule="cosine",
                workdir=str(folder / "teacher"),
            )
            train_run(config, make_console())
    return folder / "teacher"


def runs_of(name: str, graph: ktg.Graph, where: str) -> list[TrainConfig]:
    """The trainings of a graph, one a seed."""
    folder = Path("runs/carried") / where
    file = folder / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    carried(graph, where).save(file)
    # One order of the images for all seeds where the teacher is one, so that it is recorded once.
    order = 0 if where == "resnet14" else None
    return [
        TrainConfig(
            **PLACES[where],
            val_fraction=0.0,
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
