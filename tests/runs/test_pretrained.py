"""Frozen nodes that are trained first: once for each setting, alone, without the test images."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import own_cache, result, train

from experiments.runs.workdir import Workdir

pytestmark = pytest.mark.slow

DISTILLATION: dict[str, Any] = {
    "graph": "distillation",
    "models": ("tiny", "tiny"),
    "weights": ("none", "pretrained"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    home.mkdir()
    monkeypatch.setenv("KTG_CACHE_DIR", str(own_cache(home)))
    return home / "pretrained"


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("tiny-*") if path.is_dir())


def test_it_is_the_network_trained_alone(tmp_path: Path, cache: Path) -> None:
    said = train(tmp_path / "distilled", **DISTILLATION)
    assert "The frozen tiny is trained first." in said
    train(tmp_path / "alone", graph="independent", models=("tiny",))
    alone, teacher = (
        result(tmp_path / "alone")["target"],
        result(tmp_path / "distilled")["nodes"][1],
    )
    assert teacher["frozen"]
    for key in ("val_accuracy", "val_loss", "test_accuracy", "test_loss"):
        assert teacher[key] == alone[key]
    (folder,) = kept(cache)
    assert Workdir(folder).result is not None
    assert result(folder)["target"]["test_accuracy"] is None  # nobody looked at test images


def test_it_is_trained_once_for_each_setting(tmp_path: Path, cache: Path) -> None:
    train(tmp_path / "first", **DISTILLATION)
    (folder,) = kept(cache)
    written = (folder / "result.json").stat().st_mtime_ns
    both = DISTILLATION | {"models": ("tiny", "tiny", "tiny"), "temperature": 2.0}
    said = train(tmp_path / "other", **both | {"weights": ("none", "pretrained", "pretrained")})
    assert "trained first" not in said
    assert (folder / "result.json").stat().st_mtime_ns == written
    for number, changes in enumerate(({"epochs": 2}, {"seed": 1}, {"train_limit": 180}), start=1):
        said = train(tmp_path / f"changed-{number}", **DISTILLATION | changes)
        assert said.count("trained first") == 1
        assert len(kept(cache)) == 1 + number


def test_one_that_was_interrupted_is_not_taken_for_whole(tmp_path: Path, cache: Path) -> None:
    train(tmp_path / "first", **DISTILLATION)
    (folder,) = kept(cache)
    (folder / "result.json").unlink()  # as if it was killed before
    said = train(tmp_path / "second", **DISTILLATION)
    assert "trained first" in said
    assert Workdir(folder).result is not None
    assert result(tmp_path / "first") == result(tmp_path / "second")


def test_a_run_says_what_it_began_with(tmp_path: Path) -> None:
    train(tmp_path / "run", **DISTILLATION)
    graph = json.loads((tmp_path / "run" / "graph.json").read_text())
    assert [node["weights"] for node in graph["nodes"]] == [None, "pretrained"]
    assert "is finished" in train(tmp_path / "run", **DISTILLATION)


def test_a_files_teacher_is_trained_anew_where_its_own_weights_do_not_fit(tmp_path: Path) -> None:
    """As for a graph that was found on one data set and is carried to another."""
    graph = tmp_path / "found.json"
    graph.write_text(
        json.dumps(
            {
                "nodes": [
                    {"name": "student", "model": "cnn"},
                    {"name": "teacher", "model": "cnn", "weights": "gone", "input": "imagenet"},
                ],
                "gates": [["linear", "through"], ["cutoff", "cutoff"]],
                "temperature": 4.0,
            }
        )
    )
    given: dict[str, Any] = {
        "models": ("tiny", "tiny"),
        "weights": ("none", "pretrained"),
        "inputs": ("none", "half"),
    }
    said = train(tmp_path / "carried", graph=str(graph), **given)
    assert "The frozen tiny is trained first." in said
    carried = json.loads((tmp_path / "carried" / "graph.json").read_text())
    assert carried["gates"][0] == ["linear", "through"]
    assert carried["temperature"] == 4.0
    student, teacher = carried["nodes"]
    assert (student["name"], student["model"], student["weights"]) == ("student", "tiny", None)
    assert (teacher["name"], teacher["model"]) == ("teacher", "tiny")
    assert (teacher["weights"], teacher["input"]) == ("pretrained", "half")
    assert result(tmp_path / "carried")["nodes"][1]["frozen"]
