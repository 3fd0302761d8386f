"""Folders of any name: what is written there can be read, and commands that name them be copied."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import pytest
from made_up_states import NAMES, TEMPLATE, state_of
from runs import end_of, finished, in_process, options, result, small, start, train

from experiments import evaluate
from experiments import train as train_module
from experiments.runs.graphs import split_source
from ktg_jax.data.tfds import prepare_command
from ktg_jax.errors import InputError
from ktg_jax.io.files import write_text
from ktg_jax.io.plain_path import PlainFolder
from ktg_jax.training import checkpoint_reading
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.checkpoint_reading import best_checkpoint, read_nodes
from ktg_jax.training.warm_start import load_weights

STRANGE = (
    *("lr[0.1]", "a*b?", "a\\b", "gs:", "file:", "a b", "50%25", "a:b", "a#b", "ü", "a\nb"),
    *("{x}", "a'b\"c", "$HOME", "~x", "-x", "x.orbax-checkpoint-tmp", "x" * 250),
)


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: ascii(name)[:20])
def test_checkpoints_come_back_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for epoch in (1, 2):
            checkpoints.save(epoch, state_of(epoch), NAMES, 0.5)
    with Checkpoints(folder) as checkpoints:
        epoch, state, messages = checkpoints.restore_latest(TEMPLATE, NAMES)
    assert (epoch, messages) == (2, [])
    chex.assert_trees_all_equal(state, state_of(2))
    assert read_nodes(folder, 1)[0] == 1
    assert best_checkpoint(folder) == 1
    assert os.listdir(tmp_path) == [name]


def test_two_folders_of_like_names_are_kept_apart(tmp_path: Path) -> None:
    """A backslash is no separator."""
    for epoch, name in ((1, "a\\b"), (2, "a/b")):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(epoch, state_of(epoch), NAMES, None)
    assert read_nodes(tmp_path / "a\\b")[0] == 1
    assert read_nodes(tmp_path / "a/b")[0] == 2


@pytest.mark.slow
def test_a_run_in_a_folder_with_brackets_is_a_run_as_any_other(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    workdir = tmp_path / "runs" / "lr[0.1]"
    command = options(small(workdir))
    ended = end_of(start("experiments.train", *command, cwd=tmp_path))
    assert (ended.code, ended.err) == (0, "")
    assert result(workdir) == result(finished(tmp_path_factory, "tiny"))
    assert list((tmp_path / "temporary").iterdir()) == []
    (workdir / "result.json").unlink()
    assert "Resuming after epoch 3 of 3" in train(workdir)
    assert load_weights(f"{workdir}:tiny-1").model == "tiny"
    ended = in_process(evaluate.main, workdir, "--export", tmp_path / "[x].safetensors")
    assert (ended.code, ended.err) == (0, "")
    assert load_weights(str(tmp_path / "[x].safetensors")).model == "tiny"


def test_a_link_that_was_cleared_away_is_made_again(tmp_path: Path) -> None:
    plain = PlainFolder(tmp_path / "a[1]")
    shutil.rmtree(plain.path.parent)
    assert plain.path.readlink() == tmp_path / "a[1]"
    home = plain.path.parent
    del plain
    assert not home.exists()


def test_where_no_link_can_be_made_strange_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktg_jax.io.plain_path.os.path.isdir", lambda path: False)
    with pytest.raises(InputError, match=r"^TMPDIR: got .*; allowed: a folder whose path"):
        Checkpoints(tmp_path / "a[1]")


# --- loss is noticed


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_back_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint_reading._read_checked

    def damaged(path: Path, wanted: Any) -> Any:
        (path / "nodes" / "_METADATA").unlink()
        return read(path, wanted)

    monkeypatch.setattr(checkpoint_reading, "_read_checked", damaged)
    ended = in_process(train_module.main, *options(small(tmp_path / "run")))
    assert ended.code == 1
    assert ended.err.startswith("failed: checkpoint 1 is damaged (")
    assert "though just written" in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_only_the_first_checkpoint_of_a_process_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noted(path: Path, wanted: Any) -> dict[str, Any]:
        read.append(path.name)
        return {}

    monkeypatch.setattr(checkpoint_reading, "_read_checked", noted)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for epoch in (4, 5, 6):
            checkpoints.save(epoch, state_of(epoch), NAMES, None)
    assert read == ["4"]


WARNS = """
import logging
from experiments.runs import cli
from ktg_jax.errors import RunError

def main():
    logger = logging.getLogger("absl")
    logger.info("a file was written")
    logger.warning("a file was lost")
    try:
        raise RuntimeError("a file cannot be written")
    except RuntimeError as error:
        logger.exception("thread: %s", error)
        raise RunError("one line") from None

cli.run(main)
"""


def test_warnings_of_orbax_are_shown_but_not_what_it_raises_anyway() -> None:
    ended = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("a file was lost\nfailed: one line\n")
    assert len(ended.stderr.splitlines()) == 2


# --- names in texts


def test_a_folder_with_a_colon_and_a_number_is_itself(tmp_path: Path) -> None:
    search = tmp_path / "search:12"
    search.mkdir()
    assert split_source(str(search)) == (str(search), None)
    assert split_source(f"{search}:3") == (str(search), 3)
    assert split_source(f"{tmp_path}/search:13") == (f"{tmp_path}/search", 13)


def test_the_command_that_prepares_data_can_be_copied_into_a_shell() -> None:
    folder = '/data/it\'s "a" $HOME `x` \\ folder'
    command = prepare_command("cifar10", folder).partition(", then ")[2]
    said = subprocess.run(
        ["sh", "-c", command.replace("python -c", "printf %s")], capture_output=True, text=True
    )
    keywords = [n for n in ast.walk(ast.parse(said.stdout)) if isinstance(n, ast.keyword)]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
    assert given == {"data_dir": folder, "file_format": "array_record"}


def test_a_long_name_is_written_through_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / f"{'ü' * 120}.json"  # 245 bytes; the temporary name has more to it
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    ended = in_process(train_module.main, *options(small(tmp_path / ("x" * 300))))
    assert ended.code == 2
    assert ended.err.startswith("error: workdir: got ")
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
