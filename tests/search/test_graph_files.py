"""The graphs that a search leaves as files, and the training of them."""

from pathlib import Path

import pytest

import ktg_jax as ktg
from experiments.runs.config import TrainConfig
from experiments.runs.graphs import build_graph
from experiments.search.graph_files import GraphFiles
from experiments.search.records import TrialRecord
from ktg_jax.errors import InputError

ALONE = ktg.graphs.independent(["cnn", "cnn"])
MUTUAL = ktg.graphs.mutual(["cnn", "cnn"])
TAUGHT = ktg.graphs.distillation("cnn", "resnet8")


def complete(number: int, graph: ktg.Graph, value: float) -> TrialRecord:
    return TrialRecord(number, "complete", graph, value)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))


def graph_of(source: str | Path) -> ktg.Graph:
    return build_graph(TrainConfig(graph=str(source)))


def test_each_trial_and_the_best_are_written_as_they_are_trained(tmp_path: Path) -> None:
    files = GraphFiles(tmp_path)
    drawn = TrialRecord(2, "running")
    files.write([complete(0, ALONE, 0.5), TrialRecord(1, "running", TAUGHT), drawn])
    assert names(tmp_path) == ["best.json", "graphs/0.json", "graphs/1.json"]
    assert graph_of(tmp_path).nodes == ALONE.nodes[:1]  # pruned for the target
    assert graph_of(f"{tmp_path}:0") == ktg.Graph.load(tmp_path / "graphs/0.json")
    taught = graph_of(f"{tmp_path}:1")
    assert [node.weights for node in taught.nodes] == [None, "pretrained"]
    assert taught.gates == TAUGHT.gates


def test_the_best_is_the_first_of_the_highest_value(tmp_path: Path) -> None:
    files = GraphFiles(tmp_path)
    trials = [complete(0, ALONE, 0.5), TrialRecord(1, "failed", MUTUAL, reason="broken")]
    files.write(trials)
    assert len(graph_of(tmp_path).nodes) == 1
    files.write([*trials, complete(2, MUTUAL, 0.75), complete(3, TAUGHT, 0.75)])
    assert graph_of(tmp_path) == MUTUAL
    files.write([*trials, complete(2, MUTUAL, 0.75), complete(4, TAUGHT, 0.8)])
    assert graph_of(tmp_path).nodes[1].weights == "pretrained"


def test_a_search_that_goes_on_leaves_files_alone_and_adds_those_that_lack(tmp_path: Path) -> None:
    trials = [complete(0, ALONE, 0.5), complete(1, MUTUAL, 0.6)]
    GraphFiles(tmp_path).write(trials)
    written = (tmp_path / "graphs/0.json").stat()
    (tmp_path / "graphs/1.json").unlink()
    (tmp_path / "best.json").unlink()
    GraphFiles(tmp_path).write(trials)
    assert names(tmp_path) == ["best.json", "graphs/0.json", "graphs/1.json"]
    assert (tmp_path / "graphs/0.json").stat() == written


def test_a_folder_without_such_a_graph_is_refused(tmp_path: Path) -> None:
    nothing = "the folder of a search with a complete trial"
    with pytest.raises(InputError, match=rf"graph: .*; allowed: {nothing} \(no best.json there\)"):
        graph_of(tmp_path)
    with pytest.raises(InputError, match=rf"{nothing} \(no graphs there\)"):
        graph_of(f"{tmp_path}:0")
    GraphFiles(tmp_path).write([complete(3, ALONE, 0.5), complete(12, MUTUAL, 0.6)])
    with pytest.raises(InputError, match=rf"graph: .*:4'; allowed: a trial of {tmp_path}: 3 to 12"):
        graph_of(f"{tmp_path}:4")
    with pytest.raises(
        InputError, match="allowed: mutual, independent, distillation, chain, a JSON"
    ):
        graph_of(tmp_path / "gone")
