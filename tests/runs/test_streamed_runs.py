"""Runs whose images stay in their files, by the command."""

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from data_files import save_split
from runs import (
    Ended,
    assert_same_end,
    end_of,
    in_process,
    metrics,
    options,
    result,
    small,
    start,
    train,
)
from several_processes import assert_alike, ends_of, started

from experiments import evaluate as evaluate_module
from experiments import train as train_module
from ktg_jax.training.checkpoint_reading import checkpoint_epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images to train on, and splits of their own to evaluate on."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (split, count) in enumerate((("train", 50), ("val", 10), ("test", 10))):
        save_split(folder / split, per_class=count, classes="abc", seed=seed)
    return folder


def given(folder: Path, **changes: Any) -> dict[str, Any]:
    """The options of a run of these images."""
    fixed: dict[str, Any] = {"data": f"folder:{folder}", "train_limit": None, "batch_size": 16}
    return {**fixed, "stream": True, **changes}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(workdir, **given(folder))
    return workdir


def assert_same_training(workdir: Path, other: Path) -> None:
    assert metrics(workdir) == metrics(other)
    assert result(workdir) == result(other)


def test_a_stream_is_the_same_training_as_memory(whole: Path, folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", **given(folder, stream=False))
    assert_same_training(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"stream_workers": 2}, {"engine": "fused"}])
def test_how_it_is_read_and_computed_makes_no_other_run(
    changes: dict[str, Any], whole: Path, folder: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run", **given(folder, **changes))
    assert_alike(tmp_path / "run", whole)
    assert "is finished" in train(whole, **given(folder, **changes))


def test_random_parts_are_evaluated_by_their_middle(folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", **given(folder, crop="resized", image_size=8, epochs=2))
    said = in_process(evaluate_module.main, tmp_path / "run")
    assert said.code == 0, said
    accuracy = result(tmp_path / "run")["target"]["test_accuracy"]
    assert f"{100 * accuracy:.2f} %" in said.out
    train(tmp_path / "plain", **given(folder, image_size=8, epochs=2))
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "run")


def killed(workdir: Path, folder: Path, cwd: Path, number: signal.Signals, **more: Any) -> Ended:
    """Starts the run with workers, and sends all its processes a signal after an epoch."""
    config = small(workdir, **given(folder, epochs=40, stream_workers=2, **more))
    process = start("experiments.train", *options(config), cwd=cwd, cache=cwd / "cache")
    before = max(checkpoint_epochs(workdir / "checkpoints"), default=0)
    until = time.monotonic() + 200
    while max(checkpoint_epochs(workdir / "checkpoints"), default=0) <= before:
        assert process.poll() is None, end_of(process)
        assert time.monotonic() < until
        time.sleep(0.02)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) >= 3
    for each in everyone if number != signal.SIGKILL else everyone[:1]:
        each.send_signal(number)
    ended = end_of(process)
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive
    return ended


@pytest.mark.slow
def test_killed_and_stopped_it_ends_bit_for_bit_where_it_would_have(
    folder: Path, tmp_path: Path
) -> None:
    wanted, workdir = tmp_path / "wanted", tmp_path / "run"
    train(wanted, **given(folder, epochs=40))
    assert killed(workdir, folder, tmp_path, signal.SIGKILL).code == -signal.SIGKILL
    stopped = killed(workdir, folder, tmp_path, signal.SIGTERM)
    assert stopped.code == 143, stopped
    assert stopped.err == (
        "interrupted by SIGTERM; the same command goes on from the last checkpoint\n"
    )
    said = train(workdir, **given(folder, epochs=40))
    assert "Resuming" in said
    assert_same_end(workdir, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_ends_it_with_its_name(workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    save_split(folder / "train", per_class=20, classes="abc")
    train(tmp_path / "run", **given(folder, epochs=1))
    path = folder / "train" / "b" / "7.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    config = small(tmp_path / "other", **given(folder, stream_workers=workers))
    process = start("experiments.train", *options(config), cwd=tmp_path)
    ended = end_of(process)
    assert ended.code == 2
    assert ended.err == (f"error: data: got '{path}'; allowed: a complete, undamaged image file\n")


@pytest.mark.slow
def test_each_of_several_processes_reads_its_part(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    processes = started(2, tmp_path / "run", tmp_path, **given(folder, mixup=0.3))
    ended = ends_of(processes)
    assert [each.code for each in ended] == [0, 0], ended
    train(tmp_path / "alone", **given(folder, mixup=0.3))
    assert_alike(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": False, "crop": "resized"}, "crop: got 'resized'; allowed: shift without"),
        ({"stream": False, "stream_workers": 2}, "stream_workers: got 2; allowed: 0 without"),
        ({"stream_workers": 1000}, "stream_workers: got 1000; allowed: at most 256"),
        ({"data": "digits"}, "stream: got True; allowed: data that stays in files: cifar10"),
        ({"inputs": ("data", "none")}, "inputs[0]: got 'data'; allowed: mean and std in numbers"),
        ({"crop": "resized"}, "image_size: got None; allowed: pixels, where parts of images"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    for workdir in (str(tmp_path / "run"), None):  # whose name is made of the data
        config = dataclasses.replace(small("run", **given(folder, **changes)), workdir=workdir)
        ended = in_process(train_module.main, *options(config))
        assert ended.code == 2
        assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_files_are_other_data(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "pictures"
    save_split(own / "train", per_class=20, classes="abc")
    train(tmp_path / "run", **given(own, epochs=1))
    assert "is finished" in train(tmp_path / "run", **given(own, epochs=1))
    (own / "train" / "a" / "0.png").rename(own / "train" / "a" / "00.png")
    config = small(tmp_path / "run", **given(own, epochs=1))
    ended = in_process(train_module.main, *options(config))
    assert ended.code == 2
    assert "data_facts.train_crc32" in ended.err
