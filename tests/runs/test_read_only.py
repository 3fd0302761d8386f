"""What only reads a folder writes nothing in it, and needs no right to."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from read_only import read_only
from runs import finished, in_process, options, own_cache, result, small, train
from searches import STUDY, small_search, study_url, work

import experiments.evaluate
import experiments.report.command
import experiments.search.command
import experiments.train
from experiments.search.config import resolved
from experiments.search.folder import SearchFolder, load_search
from experiments.search.graph_files import GraphFiles
from ktg_jax.training.warm_start import load_weights

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SEARCHED = small_search(trials=5, pruner="none", epochs=2)


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run that can only be read."""
    path = tmp_path / "run"
    shutil.copytree(finished(tmp_path_factory, "tiny"), path)
    (path / ".lock").unlink()
    with read_only(path):
        with pytest.raises(OSError):
            (path / "more").touch()
        yield path


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Path]:
    """The folder of a search that only pretended to train, and can only be read."""
    path = tmp_path / "a search"
    fields = resolved(SEARCHED, SEARCHED.space())
    with SearchFolder(path).begun_search(fields, STUDY, None, None, []):
        work(study_url(path), SEARCHED, lambda graph, seed: [0.25, 0.5])
    GraphFiles(path).write(load_search(path).trials)
    for name in (".lock", "study.db.lock"):
        (path / name).unlink()
    with read_only(path):
        yield path


def test_a_run_is_evaluated_and_taken_from(run: Path, tmp_path: Path) -> None:
    files = sorted(run.rglob("*"))
    ended = in_process(experiments.evaluate.main, run, "--export", tmp_path / "a.safetensors")
    assert (ended.code, ended.err) == (0, "")
    assert load_weights(f"{run}:tiny-1").model == "tiny"
    changes: dict[str, Any] = {"graph": "distillation", "weights": ("none", str(run)), "epochs": 1}
    train(tmp_path / "student", **changes)
    assert "is finished; nothing to do" in train(run)
    assert sorted(run.rglob("*")) == files


def test_a_run_that_is_to_go_on_says_that_it_cannot(run: Path, tmp_path: Path) -> None:
    for workdir, changes in ((run, {"resume": False}), (run / "inner", {})):
        config = small(workdir, **changes)
        ended = in_process(experiments.train.main, *options(config))
        assert ended.code == 2
        assert ended.err.startswith(f"error: workdir: got '{workdir}'; allowed: a folder that can")
        assert ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_search_is_reported_elsewhere(search: Path, tmp_path: Path) -> None:
    files = sorted(search.rglob("*"))
    ended = in_process(experiments.report.command.main, search)
    assert ended.code == 2
    assert ended.err.startswith(f"error: output: got '{search}/report.html'; allowed: a file that")
    assert "--output FILE" in ended.err
    assert ended.err.count("\n") == 1
    page = tmp_path / "page.html"
    ended = in_process(experiments.report.command.main, search, "--output", page)
    assert (ended.code, ended.err) == (0, "")
    assert f"Wrote {page}." in ended.out
    assert STUDY in page.read_text()
    assert sorted(search.rglob("*")) == files


def test_graphs_of_a_search_are_trained(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cache"
    home.mkdir()
    monkeypatch.setenv("KTG_CACHE_DIR", str(own_cache(home)))
    for graph in (str(search), f"{search}:0"):
        workdir = tmp_path / graph.replace("/", "-")
        train(workdir, graph=graph, models=(), epochs=1)
        assert result(workdir)["target"]["model"] == "tiny"


def test_reading_a_search_that_can_be_written_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "search"
    fields = resolved(SEARCHED, SEARCHED.space())
    with SearchFolder(path).begun_search(fields, STUDY, None, None, []):
        work(study_url(path), SEARCHED, lambda graph, seed: [0.25, 0.5])
    (path / "study.db.lock").unlink()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}
    assert len(load_search(path).trials) == 5
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}
