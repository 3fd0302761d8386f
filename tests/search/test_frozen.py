"""Frozen networks of a search: recorded once, read in every trial, and the same training."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers its models)
from rich.console import Console
from searches import small_search

import ktg_jax as ktg
from experiments.runs import frozen
from experiments.runs.assemble import load
from experiments.runs.config import TrainConfig
from experiments.runs.frozen import FrozenRecordings, recordable
from experiments.search.retraining import retrain
from experiments.search.trial import Trainer
from experiments.train import train
from ktg_jax import Edge, Graph, Node
from ktg_jax.training.warm_start import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("home")]

TAUGHT = Graph(["tiny", "tiny", "staged"],
               [["through", "linear", "correct"], ["cutoff"] * 3, ["cutoff"] * 3])  # fmt: skip


def trainer(tmp_path: Path, recordings: Path | None, **changes: Any) -> Trainer:
    config = small_search(tmp_path / "search", epochs=2, **changes)
    dataset = load(config, with_test=False)
    return Trainer(config.training(), dataset, jax.local_devices()[0], recordings)


def test_each_is_recorded_once_and_trains_the_others_as_if_it_ran(tmp_path: Path) -> None:
    live, read = trainer(tmp_path, None), trainer(tmp_path, tmp_path / "recordings")
    expected = [value for _, value in live.epochs(TAUGHT, 0)]
    assert (live.recorded_epochs, live.read_epochs) == (0, 0)
    curves = []
    for recorded in (4, 0):
        curves.append([value for _, value in read.epochs(TAUGHT, 0)])
        assert (read.recorded_epochs, read.read_epochs) == (recorded, 4)
        # Pre-training was paid by the first trainer; a target costs 2, and a recording a third.
        assert read.node_epochs == pytest.approx(2 + recorded / 3)
    assert curves[0] == curves[1]
    np.testing.assert_allclose(curves[0], expected, atol=0.06)  # float16, on 40 images
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "recordings").glob("*/")) == [
        "staged",
        "tiny",
    ]
    # Another seed of initial weights has the same batches, and the same frozen networks.
    again = [value for _, value in read.epochs(TAUGHT, 1)]
    assert again != curves[0]
    assert (read.recorded_epochs, read.read_epochs, read.node_epochs) == (0, 4, 2)


def test_a_training_from_recordings_ends_where_the_live_one_does(tmp_path: Path) -> None:
    weights = tmp_path / "teacher"
    base = TrainConfig(imports=("tiny_models",), train_limit=200, epochs=2, batch_size=32)
    alone = dataclasses.replace(base, graph="independent", models=("tiny",), workdir=str(weights))
    quiet = Console(quiet=True)
    train(alone, quiet)
    taught = dataclasses.replace(
        base, graph="distillation", models=("tiny", "tiny"), weights=("none", str(weights))
    )
    ends = []
    for name, given in (("live", None), ("read", FrozenRecordings(tmp_path / "recordings"))):
        train(dataclasses.replace(taught, workdir=str(tmp_path / name)), quiet, frozen=given)
        ends.append(load_weights(str(tmp_path / name)).params)
    for path, array in ends[0].items():
        np.testing.assert_allclose(ends[1][path], array, rtol=0.05, atol=0.01, err_msg=path)


def test_a_network_whose_stages_are_seen_or_that_is_too_large_runs_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = [Node("staged"), Node("staged", weights="w")]
    for edge, expected in [
        ("through", (1,)),
        (Edge(loss="attention"), ()),
        (Edge(loss={"kl": 1, "features": 1}, connector="conv"), ()),
        (Edge(connector="linear"), (1,)),
        (Edge("cutoff", "attention"), (1,)),
    ]:
        assert recordable(Graph(teacher, [["through", edge], ["cutoff"] * 2])) == expected
    monkeypatch.setattr(frozen, "MOST_BYTES", 10)
    read = trainer(tmp_path, tmp_path / "recordings")
    assert len(list(read.epochs(TAUGHT, 0))) == 2
    assert (read.recorded_epochs, read.read_epochs) == (0, 0)


def test_the_fair_ending_records_what_several_runs_hear(tmp_path: Path) -> None:
    graphs = {"one": TAUGHT.pruned((0,)), "two": ktg.graphs.distillation("tiny", "tiny")}
    runs = []
    for name, graph in graphs.items():
        nodes = [dataclasses.replace(n, weights="pretrained" if i else None)
                 for i, n in enumerate(graph.nodes)]  # fmt: skip
        file = tmp_path / f"{name}.json"
        dataclasses.replace(graph, nodes=tuple(nodes)).save(file)
        config = small_search(tmp_path / "search", epochs=1).training(
            graph=str(file), val_fraction=0.0, workdir=str(tmp_path / name)
        )
        runs.append(dataclasses.asdict(config))
    retrain(runs, jax.local_devices()[0], tmp_path / "recordings")
    made = [path.name.split("-")[0] for path in (tmp_path / "recordings").glob("*/")]
    assert made == ["tiny"]
    assert all((tmp_path / name / "result.json").is_file() for name in graphs)
