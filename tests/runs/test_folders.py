"""Whose folder it is: locked first, then looked at, then begun; and what is damaged in it."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from runs import (
    ROOT,
    Ended,
    assert_same_end,
    end_of,
    finished,
    in_process,
    options,
    result,
    small,
    start,
    train,
)

from experiments import evaluate
from experiments import train as train_module
from experiments.runs.folder import Folder, FolderBusyError
from experiments.runs.workdir import Workdir
from ktg_jax.errors import InputError
from ktg_jax.training.warm_start import load_weights

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read only."""
    return finished(tmp_path_factory, "tiny")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def stop(workdir: Path) -> None:
    (workdir / "result.json").unlink()


def trained(workdir: Path, **changes: Any) -> Ended:
    return in_process(train_module.main, *options(small(workdir, **changes)))


def assert_one_line(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: " if code == 2 else "failed: ")
    for part in parts:
        assert part in ended.err


# --- whose it is


def test_checkpoints_without_a_config_are_nobodys(whole: Path, run: Path) -> None:
    stop(run)
    (run / "config.json").unlink()
    before = sorted(run.rglob("*"))
    for seed in (0, 7):
        ended = trained(run, seed=seed)
        assert_one_line(ended, 2, str(run), "checkpoints, metrics.jsonl", "--no-resume")
        assert sorted(run.rglob("*")) == before
    said = train(run, resume=False)
    assert f"The former run is kept in {run}.old1." in said
    assert_same_end(run, whole)
    assert (run.with_name("run.old1") / "checkpoints" / "3").is_dir()


def test_a_folder_with_files_of_ones_own_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir()
    train(tmp_path / "run", epochs=1, models=("tiny",))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_of_two_that_begin_at_once_one_wins(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        configs = [small(tmp_path / "run", seed=seed, epochs=40) for seed in (1, 2)]
        processes = [
            start("experiments.train", *options(config), cwd=tmp_path, cache=cache)
            for config in configs
        ]
        ends = [end_of(process) for process in processes]
        assert sorted(end.code for end in ends) == [0, 2]
        winner, loser = sorted(range(2), key=lambda i: ends[i].code)
        assert_one_line(ends[loser], 2, "workdir: got ")
        assert Workdir(tmp_path / "run").config["seed"] == winner + 1


def test_a_folder_is_looked_at_under_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins there after the first look, while this one loads its data."""
    lock = Workdir.locked

    def begun_meanwhile(self: Workdir) -> Any:
        if not self.exists:
            self.write("config.json", {"config": {"seed": 5}})
        return lock(self)

    monkeypatch.setattr(Workdir, "locked", begun_meanwhile)
    assert_one_line(trained(tmp_path / "run"), 2, "config.json")
    assert set(os.listdir(tmp_path / "run")) <= {"config.json", ".lock"}


def test_a_folder_that_was_set_aside_meanwhile_is_not_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, aside = Folder(tmp_path / "run"), tmp_path / "aside"
    here.path.mkdir()
    opened = Path.open

    def then_renamed(self: Path, *arguments: Any) -> Any:
        file = opened(self, *arguments)
        here.path.rename(aside)
        here.path.mkdir()
        return file

    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(Path, "open", then_renamed)
        with pytest.raises(FolderBusyError):
            stack.enter_context(here.locked())


def test_what_cannot_be_begun_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Folder, name: str, content: Any) -> None:
        if name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        (self.path / name).write_text("{}")

    monkeypatch.setattr(Folder, "write", full)
    assert_one_line(trained(tmp_path / "run"), 2, "No space left")
    assert list(tmp_path.iterdir()) == []


# --- links


def test_no_resume_sets_the_folder_aside_and_leaves_the_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    shutil.copytree(whole, tmp_path / "disk" / "run")
    link = tmp_path / "link"
    link.symlink_to(Path("disk") / "run")
    said = train(link, resume=False, epochs=1)
    assert link.readlink() == Path("disk") / "run"
    assert f"kept in {tmp_path.resolve()}/disk/run.old1." in said
    assert result(link)["epochs"] == 1
    assert_same_end(tmp_path / "disk" / "run.old1", whole)
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_a_link_to_a_folder_that_is_not_there_yet_makes_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there")
    train(tmp_path / "link", epochs=1, models=("tiny",))
    assert result(tmp_path / "there")["epochs"] == 1


# --- locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(tmp_path / "run", epochs=1, models=("tiny",))
    (record,) = (record for record in caplog.records if record.name == "experiments.runs.locks")
    assert record.levelname == "WARNING"
    assert f"{tmp_path}/run/.lock cannot be locked ({os.strerror(number)})" in record.message


ELSEWHERE = """
import importlib, sys
FOLDERS = "search", "report", "represent", "ablation"
sys.modules["fcntl"] = None  # as on Windows
from experiments.runs import cli
for name in ("train", "evaluate", *(f"{name}.command" for name in FOLDERS)):
    try:
        cli.run(importlib.import_module(f"experiments.{name}").main)
    except SystemExit as end:
        assert end.code == 2
"""


def test_another_system_is_told_which_are_supported(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    line = f"error: platform: got '{sys.platform}'; allowed: Linux or macOS; on Windows, within WSL"
    assert (ended.returncode, ended.stderr.splitlines()) == (0, [line] * 6)
    assert list(tmp_path.iterdir()) == []


# --- damage


def write(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "cut": cut,
    "binary": write(b"\xff\xfe\x00\x81" * 30),
    "a number": write("3"),
    "a list": write("[]"),
    "empty": write("{}"),
    "another": write('{"config": 3, "target": [], "nodes": {}, "gates": 0, "epoch": 1}'),
    "nested": write('{"config": {"data": "digits", "graph": []}, "target": {"name": 1}}'),
    "deep": write("[" * 100_000),
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", [key for key in DAMAGES if key != "gone"])
def test_a_damaged_config_is_one_line_with_the_way_out(whole: Path, run: Path, damage: str) -> None:
    DAMAGES[damage](run / "config.json")
    for ended in (trained(run), in_process(evaluate.main, run)):
        assert_one_line(ended, 2, str(run), "config.json", "train --no-resume")
    assert load_weights(str(run)).model == "tiny"  # graph.json is whole
    train(run, resume=False, epochs=1)
    assert (run.with_name("run.old1") / "checkpoints").is_dir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_made_again(whole: Path, run: Path, damage: str) -> None:
    DAMAGES[damage](run / "result.json")
    if damage == "a folder":
        assert_one_line(trained(run), 1, "Is a directory", "result.json")
        return
    said = train(run)
    assert ("result.json is damaged; it is made again." in said) == (damage != "gone")
    assert_same_end(run, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_graph_is_written_again(whole: Path, run: Path, damage: str) -> None:
    DAMAGES[damage](run / "graph.json")
    ended = in_process(evaluate.main, run)
    assert (ended.code, ended.err) == (0, "")
    assert load_weights(f"{run}:tiny-1").model == "tiny"
    stop(run)
    if damage == "a folder":
        assert_one_line(trained(run), 2, "Is a directory", "graph.json")
        return
    train(run)
    assert (run / "graph.json").read_text() == (whole / "graph.json").read_text()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_one_line_with_the_way_out(run: Path, damage: str) -> None:
    found = in_process(evaluate.main, run, "--checkpoint", "best").out
    DAMAGES[damage](run / "metrics.jsonl")
    best = in_process(evaluate.main, run, "--checkpoint", "best")
    assert (best.code, best.out) == (0, found)  # the checkpoints know it, too
    stop(run)
    ended = trained(run)
    assert_one_line(ended, 1, f"{run}/metrics.jsonl", "train --no-resume")
    train(run, resume=False, epochs=1)
    assert (run.with_name("run.old1") / "checkpoints").is_dir()


def test_a_graph_and_a_config_that_are_both_damaged_are_named(run: Path) -> None:
    for name in ("config.json", "graph.json"):
        cut(run / name)
    with pytest.raises(InputError, match=r"^weights: .*readable graph\.json"):
        load_weights(str(run))


def test_a_config_says_when_it_was_begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted anew is where things are; versions are those it was begun with."""
    content = json.loads((run / "config.json").read_text())
    content["versions"]["jax"] = "0.0.1"
    (run / "config.json").write_text(json.dumps(content))
    stop(run)
    monkeypatch.chdir(run)
    train(run, data_dir="here")
    known = json.loads((run / "config.json").read_text())
    assert known["versions"] == content["versions"]
    assert (known["data_dir"], known["cwd"]) == ("here", str(run))
    assert known["config"] == content["config"]
