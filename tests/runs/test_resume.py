"""Interrupted runs go on, and end bit for bit where an uninterrupted run ends."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import (
    assert_same_end,
    end_of,
    finished,
    in_process,
    metrics,
    options,
    result,
    small,
    start,
    train,
)

from experiments import train as train_module
from experiments.runs.workdir import Workdir
from ktg_jax.errors import InputError

pytestmark = pytest.mark.slow

EPOCHS = 5
OPTIONS: dict[str, Any] = {
    "models": ("tiny", "dropping"),
    "epochs": EPOCHS,
    "learning_rate": 1.0,
    "seed": 2,
}
"""A run with batch statistics, momentum and a random stream, whose best epoch is an early one."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    workdir = finished(tmp_path_factory, "resume", **OPTIONS)
    assert result(workdir)["target"]["best"]["epoch"] <= 2
    return workdir


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """That run as it is when it is killed before it writes its result."""
    workdir = tmp_path / "stopped"
    shutil.copytree(whole, workdir)
    for name in ("result.json", "curves.png", "curves.svg", "graph.png", "graph.svg"):
        (workdir / name).unlink()
    return workdir


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Modification times and bytes of all files, but for that which a process locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- kills

KILLED = OPTIONS | {"epochs": 12}


def lines_in(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def checkpoints_in(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return [int(name) for name in names if name.isdigit()]


def is_writing_a_checkpoint(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the first line of metrics was just written": lambda w: lines_in(w) >= 1,
    "a checkpoint is being written": lambda w: lines_in(w) >= 3 and is_writing_a_checkpoint(w),
    "a checkpoint is just whole": lambda w: max(checkpoints_in(w), default=0) >= 7,
    "all checkpoints are there, but no result": lambda w: 12 in checkpoints_in(w),
}


def signal_when(
    moment: Callable[[Path], bool], workdir: Path, process: subprocess.Popen[str], number: int
) -> None:
    """Waits for the moment, and sends the signal in any case."""
    until = time.monotonic() + 200
    try:
        while not moment(workdir):
            assert process.poll() is None, f"ended before the moment: {process.communicate()}"
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.send_signal(number)


def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workdir = tmp_path / "run"

    def start_it() -> subprocess.Popen[str]:
        command = options(small(workdir, **KILLED))
        return start("experiments.train", *command, cwd=tmp_path, cache=tmp_path / "cache")

    for name, moment in MOMENTS.items():
        process = start_it()
        signal_when(moment, workdir, process, signal.SIGKILL)
        assert end_of(process).code == -signal.SIGKILL, name
        assert not (workdir / "result.json").exists(), name
    ended = end_of(start_it())
    assert (ended.code, ended.err) == (0, "")
    assert "Resuming after epoch 12 of 12" in ended.out
    assert_same_end(workdir, finished(tmp_path_factory, "kills", **KILLED))


def test_an_interrupt_ends_with_one_line_and_code_130_and_a_second_process_is_refused(
    tmp_path: Path,
) -> None:
    long = small(tmp_path / "run", epochs=100_000)
    process = start("experiments.train", *options(long), cwd=tmp_path)

    def is_kept_by_one(workdir: Path) -> bool:
        if lines_in(workdir) < 2:
            return False
        for resume in ([], ["--no-resume"]):
            refused = in_process(train_module.main, *options(long), *resume)
            assert refused.code == 2
            assert refused.err.startswith(f"error: workdir: got '{workdir}'; allowed: ")
            assert "no other process trains" in refused.err
            assert refused.err.count("\n") == 1
        return True

    signal_when(is_kept_by_one, tmp_path / "run", process, signal.SIGINT)
    ended = end_of(process)
    assert ended.code == 130
    assert re.fullmatch("interrupted; the same command .*\n", ended.err), ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    epochs = [record["epoch"] for record in metrics(tmp_path / "run")]
    assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interrupt_between_a_line_and_its_checkpoint_does_no_harm(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    append = Workdir.append_record

    def append_and_stop(self: Workdir, record: dict[str, Any]) -> None:
        append(self, record)
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "append_record", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **OPTIONS)
    assert lines_in(tmp_path / "run") == epoch
    said = train(tmp_path / "run", **OPTIONS)
    assert ("Resuming" in said) == (epoch > 1)
    assert_same_end(tmp_path / "run", whole)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def data_file(workdir: Path, epoch: int) -> Path:
    folder = workdir / "checkpoints" / str(epoch) / "nodes" / "d"
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(
    whole: Path, stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(data_file(stopped, EPOCHS))
    said = train(stopped, **OPTIONS)
    assert f"checkpoint {EPOCHS} is damaged" in said
    assert f"going back to epoch {EPOCHS - 1}" in said
    assert f"Resuming after epoch {EPOCHS - 1} of {EPOCHS}" in said
    assert_same_end(stopped, whole)


def test_without_any_whole_checkpoint_the_run_fails_and_can_start_over(
    whole: Path, stopped: Path
) -> None:
    epochs = [int(path.name) for path in (stopped / "checkpoints").iterdir()]
    for epoch in epochs:
        truncate(data_file(stopped, epoch))
    command = options(small(stopped, **OPTIONS))
    ended = in_process(train_module.main, *command)
    assert ended.code == 1
    assert re.fullmatch(f"failed: checkpoint {EPOCHS} is damaged .*starts over\n", ended.err)
    assert in_process(train_module.main, *command).code == 0
    assert_same_end(stopped, whole)


def test_a_half_written_last_line_of_metrics_is_written_again(whole: Path, stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints" / str(EPOCHS))  # it is saved after its line is written
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    said = train(stopped, **OPTIONS)
    assert f"Resuming after epoch {EPOCHS - 1} of {EPOCHS}" in said
    assert_same_end(stopped, whole)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('{"epoch": 2', '{"epo', 1),
        lambda text: text[text.index("\n") + 1 :],
        lambda text: "",
    ],
    ids=["a damaged line", "a missing line", "no line"],
)
def test_metrics_that_lack_an_epoch_before_the_checkpoint_fail_the_run(
    stopped: Path, edit: Callable[[str], str]
) -> None:
    path = stopped / "metrics.jsonl"
    path.write_text(edit(path.read_text()))
    before = content(stopped)
    ended = in_process(train_module.main, *options(small(stopped, **OPTIONS)))
    assert ended.code == 1
    assert re.fullmatch("failed: .*metrics.jsonl: .*epoch.*\n", ended.err), ended.err
    assert content(stopped) == before


# --- whose folder it is


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = content(whole)
    said = train(whole, **OPTIONS)
    assert f"{whole} is finished; nothing to do" in said
    assert f"{100 * result(whole)['target']['test_accuracy']:.2f} %" in said
    assert content(whole) == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_folder_with_another_run_is_refused_and_names_what_differs(
    whole: Path, stopped: Path, is_finished: bool
) -> None:
    workdir = whole if is_finished else stopped
    before = content(workdir)
    other = OPTIONS | {"seed": 7, "batch_size": 64, "graph": "chain", "temperature": 4.0}
    with pytest.raises(InputError) as error:
        train(workdir, **other)
    message = str(error.value)
    assert message.startswith(f"workdir: got '{workdir}'; allowed: ")
    for difference in (
        "seed: 2, now 7",
        "batch_size: 32, now 64",
        "graph.temperature: 1.0, now 4.0",
        "graph.gates: ",
        "['cutoff', 'through']",
    ):
        assert difference in message
    for same in ("epochs", "models", "learning_rate", "graph.nodes"):
        assert same not in message
    assert content(workdir) == before


def test_a_folder_whose_data_changed_is_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), np.uint8)
    data = tmp_path / "data.npz"
    changes = {"data": f"npz:{data}", "train_limit": None, "epochs": 1, "models": ("tiny",)}
    np.savez(data, images=images, labels=np.arange(80) % 4)
    train(tmp_path / "run", **changes)
    (tmp_path / "run" / "result.json").unlink()
    np.savez(data, images=images[::-1], labels=np.arange(80) % 4)
    with pytest.raises(InputError, match=r"data_facts\.train_crc32: ") as error:
        train(tmp_path / "run", **changes)
    assert error.value.field == "workdir"


def test_without_a_workdir_other_options_make_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (
        dataclasses.replace(small("unused", epochs=1, models=("tiny",)), workdir=None, seed=seed)
        for seed in (0, 1)
    )
    for config in (first, second, first):
        assert in_process(train_module.main, *options(config)).code == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("digits-mutual-") for name in names)


def test_no_resume_starts_over_and_keeps_the_former_run(whole: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    said = train(workdir, **OPTIONS, resume=False)
    assert str(tmp_path / "run.old1") in said
    assert_same_end(workdir, whole)
    assert_same_end(tmp_path / "run.old1", whole)
    inode = (workdir / "metrics.jsonl").stat().st_ino
    train(workdir, **OPTIONS | {"seed": 3, "epochs": 1}, resume=False)
    assert (tmp_path / "run.old2" / "metrics.jsonl").stat().st_ino == inode
    assert len(metrics(workdir)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.old1", "run.old2"}


def test_no_resume_with_bad_input_leaves_the_former_run_where_it_is(
    whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = content(workdir)
    with pytest.raises(InputError, match=r"^batch_size: got 181"):
        train(workdir, **OPTIONS | {"batch_size": 181}, resume=False)
    assert content(tmp_path) == before


def test_no_resume_works_from_within_the_folder(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped)
    train(".", **OPTIONS | {"epochs": 1}, resume=False)
    kept = stopped.with_name("stopped.old1")
    assert len(metrics(kept)) == EPOCHS
    assert len(metrics(stopped)) == 1
