"""Pictures of the trials' graphs, seen as one sees them: through Optuna's dashboard."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna_dashboard
import pytest
import tiny_models  # noqa: F401  (registers its models)
from PIL import Image
from searches import STUDY, PretendedTrainer, begin, small_search, study_url, worker

import ktg_jax as ktg
from experiments.search.extra import optuna
from experiments.search.pictures import Pictures, announce
from experiments.search.storage import Storage, open_storage
from experiments.search.study import run_again

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning"),
]


TRIALS = 9


def values(graph: ktg.Graph, seed: int) -> list[float | Exception]:
    return [0.25, 0.5, 0.75]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a study whose trials are done, and none of its pictures drawn; to be read only."""
    path = tmp_path_factory.mktemp("searched")
    config = small_search(trials=TRIALS, gates=("through", "cutoff"), pruner="none")
    begin(study_url(path), config)
    artifacts = str(path / "artifacts")
    worker(study_url(path), config, PretendedTrainer(values), artifacts=artifacts).search()
    return path


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / "copy"))


def storage_of(folder: Path) -> Storage:
    return open_storage(study_url(folder))


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=storage_of(folder))


def drawn(folder: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in (folder / "artifacts").iterdir()}
    return {name: content for name, content in files.items() if content}


def draw_all(folder: Path, owner: str = "here") -> None:
    study = study_in(folder)
    Pictures(storage_of(folder), folder / "artifacts", owner).draw_all(study.get_trials())


class Browser:
    """Gets pages of the dashboard."""

    def __init__(self, folder: Path) -> None:
        store = optuna.artifacts.FileSystemArtifactStore(folder / "artifacts")
        self._app = optuna_dashboard.wsgi(study_url(folder), artifact_store=store)

    def get(self, path: str) -> tuple[str, dict[str, str], bytes]:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        answer: list[Any] = []
        body: Any = self._app(environ, lambda *started: answer.extend(started))
        try:
            return answer[0], dict(answer[1]), b"".join(body)
        finally:
            if hasattr(body, "close"):
                body.close()

    def json(self, path: str) -> Any:
        status, _, body = self.get(path)
        assert status == "200 OK", body
        return json.loads(body)


def test_the_dashboard_shows_each_trained_graph(folder: Path) -> None:
    draw_all(folder)
    browser = Browser(folder)
    (summary,) = browser.json("/api/studies")["study_summaries"]
    assert summary["study_name"] == STUDY
    trials = browser.json(f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    duplicates = {t.number for t in study_in(folder).trials if "duplicate_of" in t.user_attrs}
    assert duplicates
    shown = set()
    for trial in trials:
        if trial["number"] in duplicates:
            assert trial["artifacts"] == []
            continue
        (artifact,) = trial["artifacts"]
        assert (artifact["filename"], artifact["mimetype"]) == ("graph.png", "image/png")
        status, headers, body = browser.get(
            f"/artifacts/{summary['study_id']}/{trial['trial_id']}/{artifact['artifact_id']}"
        )
        assert status == "200 OK"
        assert headers["Content-Type"] == "image/png"
        with Image.open(io.BytesIO(body)) as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture.convert("L")).min() < 50  # not an empty page
        shown.add(body)
    assert len(shown) == TRIALS - len(duplicates)  # of different graphs


def test_one_is_drawn_at_a_time_and_each_once(folder: Path) -> None:
    study = study_in(folder)
    trials = study.get_trials()
    pictures = Pictures(storage_of(folder), folder / "artifacts", "here")
    assert drawn(folder) == {}
    pictures.draw_one(trials)
    first = drawn(folder)
    assert len(first) == 1
    (file,) = (folder / "artifacts" / name for name in first)
    time_of_first = file.stat().st_mtime_ns
    pictures.draw_one(trials)
    assert len(drawn(folder)) == 2
    draw_all(folder)  # as the command does when it goes on
    assert file.stat().st_mtime_ns == time_of_first
    assert len(drawn(folder)) == len([t for t in trials if "duplicate_of" not in t.user_attrs])
    assert {f.name for f in (folder / "artifacts").iterdir()} == {*drawn(folder)}


def test_a_folder_has_pictures_of_its_own_workers_trials(folder: Path) -> None:
    draw_all(folder, owner="there")
    draw_all(folder, owner="her")
    assert drawn(folder) == {}


def test_the_picture_shows_the_accuracy_of_the_target(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[ktg.Graph, Any] = {}
    monkeypatch.setattr(
        "ktg_jax.draw.draw_graph",
        lambda graph, paths, accuracies: (
            shown.update({graph: accuracies}),
            [path.write_bytes(b"a picture") for path in paths],
        ),
    )
    draw_all(folder)
    for trial in study_in(folder).trials:
        graph = ktg.Graph.from_json(trial.user_attrs["graph"])
        if "duplicate_of" not in trial.user_attrs:
            assert shown[graph.pruned()] == {"tiny-0": trial.intermediate_values[3]}


def test_a_trial_that_is_run_again_keeps_its_artifact(tmp_path: Path) -> None:
    url = study_url(tmp_path)
    config = small_search(trials=3, pruner="none")
    study = begin(url, config)
    killed = study.ask()
    announce(killed, tmp_path / "artifacts")
    run_again(study, study.trials[killed.number])
    artifacts = str(tmp_path / "artifacts")
    worker(url, config, PretendedTrainer(values), artifacts=artifacts).search()
    again = study.trials[killed.number + 1]  # that was enqueued before the others
    storage = open_storage(url)
    (meta,) = optuna.artifacts.get_all_artifact_meta(again, storage=storage)
    (first,) = optuna.artifacts.get_all_artifact_meta(study.trials[0], storage=storage)
    assert meta.artifact_id == first.artifact_id
    draw_all(tmp_path)
    assert meta.artifact_id in drawn(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("no font [a/b]")]
)
def test_a_picture_that_cannot_be_drawn_costs_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    tried: list[Any] = []

    def fails(*arguments: Any) -> None:
        tried.append(arguments)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("ktg_jax.draw.draw_graph", fails)
        draw_all(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(folder / "artifacts") in line
    assert str(error) in line
    assert (len(tried), drawn(folder)) == (1, {})
    draw_all(folder)  # as the next command does
    assert drawn(folder)


def test_where_no_picture_can_be_announced_there_is_still_a_trial(tmp_path: Path) -> None:
    url, config = study_url(tmp_path), small_search(trials=1, pruner="none")
    begin(url, config)
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    artifacts = str(tmp_path / "artifacts")
    worker(url, config, PretendedTrainer(values), artifacts=artifacts).search()
    study = optuna.load_study(study_name=STUDY, storage=open_storage(url))
    assert [t.value for t in study.trials if t.state.is_finished()] == [0.75]


def test_matplotlib_is_imported_with_the_first_picture() -> None:
    code = "import sys, experiments.search.coordinate; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
