"""How a search is begun: bad input refused, nothing left of what failed, and where it is kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tiny_models  # noqa: F401  (registers its models)
from runs import ROOT, in_process, options
from searches import small_search

import experiments.search.command
import ktg_jax as ktg
from experiments.search import coordinate
from experiments.search.config import default_workdir
from experiments.search.extra import optuna
from experiments.search.folder import SearchFolder, load_search
from experiments.search.storage import open_storage
from experiments.search.study import begin_trial
from experiments.search.team import Orders
from ktg_jax.errors import InputError, RunError

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "error: nodes: got 0; allowed: 1 to 100 nodes"),
        ({"nodes": 10_000}, "error: nodes: got 10000; allowed: 1 to 100 nodes"),
        ({"losses": ("kl", "lk")}, "error: losses[1].loss: got 'lk'; allowed: kl, "),
        ({"losses": ('{"kl": 1, "kl": 2}',)}, "error: losses.kl: got 2; allowed: each field once"),
        ({"losses": ('{"kl": -1}',)}, "error: losses[0]"),
        ({"losses": ("cross_entropy",)}, "error: losses[0]"),
        (
            {"losses": ("kl", "features"), "candidates": ("cnn",)},
            "error: losses[1]: got 'features'",
        ),
        ({"loss_weights": (1.0, -1.0)}, "error: loss_weights[1]: got -1.0"),
        ({"edge_temperatures": (0.0,)}, "error: edge_temperatures[0]: got 0.0"),
        ({"edge_temperatures": (2.0,), "temperatures": (3.0,)}, "error: temperatures: got [3.0]"),
        ({"target": "resnet9"}, "error: target: got 'resnet9'"),
        ({"candidates": ("tiny", "no_model")}, "error: candidates[1]: got 'no_model'"),
        ({"gates": ("through", "ajar")}, "ajar"),
        ({"temperatures": (0.0,)}, "temperatures"),
        ({"temperatures": (1.0, 1e300)}, "error: temperatures[1]: got 1e+300; allowed: 1e-15 to"),
        ({"trials": 0}, "trials"),
        ({"race": 1}, "error: race: got 1; allowed: 0, or at least 2 graphs"),
        ({"race": -1}, "error: race: got -1"),
        ({"trial_seeds": 0}, "error: trial_seeds: got 0"),
        (
            {"baselines": True, "trials": 5},
            "error: trials: got 5; allowed: at least 6, the designed graphs, or --no-baselines",
        ),
        (
            {"baselines": True, "nodes": 1, "gates": ("through", "linear", "cutoff")},
            "allowed: a space with other graphs than the 2 designed ones, or --no-baselines",
        ),
        (
            {"teachers": ("nowhere",)},
            "error: teachers[0]: weights: got 'nowhere'; allowed: a run's",
        ),
        (
            {"baselines": True, "nodes": 90, "candidates": ("tiny", "cnn")},
            "error: trials: got 6; allowed: as many as there are designed graphs (up to 12,282)",
        ),
        ({"teachers": ('{"model": "tiny"}',)}, "error: teachers[0]: got "),
        ({"teacher_inputs": ("imagenet",)}, "error: teacher_inputs: got ['imagenet']; allowed: 0"),
        ({"trials": 10**4000}, "error: trials: got an integer of about 4,000 digits; allowed: at"),
        ({"workers": 0}, "workers"),
        ({"workers": 10**6}, "error: workers: got 1000000; allowed: at most 1,000"),
        ({"min_epochs": 4}, "1 to epochs (3)"),
        ({"patience": 1.5}, "patience"),
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"timeout": 0.0}, "timeout"),
        ({"retrain_seeds": 0}, "retrain_seeds"),
        ({"retrain_seeds": 10**9}, "error: retrain_seeds: got 1000000000; allowed: at most 1,000"),
        ({"seed": 2**32 - 1}, "error: seed: got 4294967295; allowed: at most 4,294,967,295, the"),
        ({"epochs": 2**31 - 1}, "error: epochs: got 2147483647; allowed: at most "),
        ({"retrain_epochs": 2**31 - 1}, "error: retrain_epochs: got 2147483647; allowed: at most"),
        ({"batch_size": 1000}, "batch_size"),
        ({"storage": "mysql://db/studies"}, "sqlite:///FILE"),
        ({"imports": ("no_such_module",)}, "no_such_module"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = small_search(tmp_path / "search", **changes)
    end = in_process(experiments.search.command.main, *options(config))
    assert end.code == 2
    assert message in end.err
    assert len(end.err.splitlines()) == 1
    assert not (tmp_path / "search").exists()


def test_an_unreachable_database_is_one_line(tmp_path: Path) -> None:
    storage = "postgresql+psycopg://me:secret@127.0.0.1:1/studies"
    config = small_search(tmp_path / "search", storage=storage)
    end = in_process(experiments.search.command.main, *options(config))
    assert end.code == 2
    assert "127.0.0.1:1" in end.err
    assert "secret" not in end.err
    assert len(end.err.splitlines()) == 1
    assert not (tmp_path / "search").exists()  # which would refuse the right storage


def test_a_search_that_cannot_be_begun_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "study.db").write_text("Some text that is no database. " * 100)
    end = in_process(experiments.search.command.main, *options(small_search(damaged)))
    assert end.code == 2
    assert "file is not a database" in end.err
    assert [path.name for path in damaged.iterdir()] == ["study.db"]

    def refuse(*arguments: Any) -> None:
        raise InputError("storage", "sqlite:///study.db", "a disk with room")

    monkeypatch.setattr(coordinate, "begin_study", refuse)
    end = in_process(experiments.search.command.main, *options(small_search(tmp_path / "search")))
    assert end.code == 2
    assert "a disk with room" in end.err
    assert not (tmp_path / "search").exists()


class FailingTeam:
    """Workers of which one begins a trial and then can do no more, nor can the database."""

    failure: BaseException = RunError("worker 0: No space left on device")

    def __init__(self, orders: list[Orders], logs: Path, on_death: Any) -> None:
        self._orders = orders[0]

    def __enter__(self) -> "FailingTeam":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def is_at_work(self) -> bool:
        url = self._orders.storage
        study = optuna.load_study(study_name=self._orders.study, storage=open_storage(url))
        with pytest.warns(UserWarning, match="supposed to be used with Study.optimize"):
            begin_trial(study.ask(), ktg.graphs.mutual(["tiny", "tiny"]), self._orders.worker)
        change(url, f"CREATE TRIGGER full BEFORE UPDATE ON trials BEGIN {FULL_DATABASE}; END")
        raise self.failure


FULL_DATABASE = "SELECT RAISE(ABORT, 'database or disk is full')"


def change(url: str, statement: str) -> None:
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.text(statement))


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RunError("worker 0: No space left"), 1, "failed: worker 0: No space left\n"),
        (OSError(28, "No space left"), 1, "failed: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "interrupted; "),
    ],
    ids=["worker", "file", "interrupt"],
)
def test_what_ends_a_search_is_told_also_where_the_database_fails(
    failure: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinate, "Team", FailingTeam)
    monkeypatch.setattr(FailingTeam, "failure", failure)
    end = in_process(experiments.search.command.main, *options(small_search(tmp_path / "search")))
    assert end.code == code
    assert end.err.startswith(message)
    assert len(end.err.splitlines()) == 1
    (left,) = load_search(tmp_path / "search").trials
    assert left.state == "running"


# --- where it is


def test_a_file_is_kept_as_it_is_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinate, "Team", FailingTeam)
    monkeypatch.chdir(tmp_path)
    # Also in the folder of the search itself, which is not there yet.
    for name in ("shared.db", "search/own.db"):
        config = small_search("search", storage=f"sqlite:///{name}")
        end = in_process(experiments.search.command.main, *options(config))
        assert end.code == 1, end.err  # of its team
        storage = f"sqlite:///{tmp_path}/{name}"
        monkeypatch.chdir("/")
        assert SearchFolder(tmp_path / "search").storage == storage
        assert storage in load_search(tmp_path / "search").command
        assert len(load_search(tmp_path / "search").trials) == 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree("search")


def test_studies_of_other_names_have_folders_of_their_own() -> None:
    names = (None, "a", "b", "a/b", "a_b", "..")
    folders = [default_workdir(small_search(study=name), {}) for name in names]
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {Path("runs")}
    assert folders[1].name == f"{folders[0].name}-a"


def test_a_full_disk_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    end = in_process(experiments.search.command.main, *options(small_search(tmp_path / "search")))
    assert end.code == 2
    assert "100 MiB free (1 MiB are)" in end.err
    assert not (tmp_path / "search").exists()


def test_without_optuna_the_error_names_the_extra(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['optuna'] = None; sys.argv = ['search']; "
    command = "from experiments.search.command import main"
    code = f"{hide}{command}; from experiments.runs import cli; cli.run(main)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert process.returncode == 2
    assert "ktg_jax[search]" in process.stderr
