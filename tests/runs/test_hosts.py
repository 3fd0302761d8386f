"""Several processes that train one graph together, with simulated devices of their own."""

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from runs import finished, in_process, options, small
from several_processes import OPTIONS, assert_alike, ends_of, started

from experiments import train as train_module
from ktg_jax.training.checkpoint_reading import checkpoint_epochs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    return finished(tmp_path_factory, "hosts", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "devices", "parallel"), [(2, 2, "jit"), (2, 2, "shard_map"), (4, 1, "jit")]
)
def test_several_processes_train_as_one_does(
    number: int, devices: int, parallel: str, alone: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    ended = ends_of(started(number, workdir, tmp_path, devices, parallel=parallel))
    assert [each.code for each in ended] == [0] * number, ended
    first, *others = ended
    assert f"on {number * devices} x cpu" in first.out
    assert all(each.out == each.err == "" for each in others)
    assert_alike(workdir, alone)
    assert {path.name for path in workdir.iterdir()} >= {"checkpoints", "result.json"}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone: Path, tmp_path: Path) -> None:
    """Stopped within an epoch by a signal to one of two, it goes on in one, and in four."""
    workdir, changes = tmp_path / "run", {"epochs": 6, "train_limit": 1400, "batch_size": 8}
    one = tmp_path / "one"
    assert in_process(train_module.main, *options(small(one, **OPTIONS | changes))).code == 0
    for number, devices in ((2, 2), (4, 1)):
        before = max(kept(workdir), default=0)
        processes = started(number, workdir, tmp_path, devices, **changes)
        until = time.monotonic() + 250
        while (
            max(kept(workdir), default=0) <= before
        ):  # an epoch is done: another one is on its way
            assert time.monotonic() < until
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[-1].send_signal(signal.SIGTERM)
        ended = ends_of(processes)
        assert [each.code for each in ended] == [143] * number, ended
        assert ended[-1].err.startswith("interrupted by SIGTERM; the same command goes on")
        assert ended[0].err.startswith("interrupted by another process; the same command")
    said = in_process(train_module.main, *options(small(workdir, **OPTIONS | changes)))
    assert said.code == 0
    assert "Resuming" in said.out
    assert_alike(workdir, one)


# --- nodes of their own

LATE = {"gate": "through", "delay": 3}
GRAPHS: dict[str, Any] = {
    # What is heard late alone travels; and with what is heard at once.
    "late": [["through", LATE, "cutoff", LATE], [{**LATE, "delay": 5}, "through", "linear", LATE]],
    "now": [["through", "correct", LATE, "linear"], [LATE, "through", "cutoff", "cutoff"]],
}


def graph_file(folder: Path, name: str) -> Path:
    """Two networks that learn, an average of one, and a recurring guest that never does."""
    nodes = [
        {"name": "a", "model": "tiny"},
        {"name": "b", "model": "dropping"},
        {"name": "mean", "average": "b", "decay": 0.9},
        {"name": "c", "model": "tiny"},
    ]
    gates = [*GRAPHS[name], ["cutoff"] * 4, [LATE, "cutoff", "cutoff", "through"]]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"nodes": nodes, "gates": gates, "temperature": 2.0}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_processes_with_nodes_of_their_own_train_as_one_simulates_it(
    name: str, tmp_path: Path
) -> None:
    graph = str(graph_file(tmp_path, name))
    changes: dict[str, Any] = {"graph": graph, "models": (), "epochs": 4}
    alone = tmp_path / "alone"
    config = small(alone, **changes)
    assert in_process(train_module.main, *options(config)).code == 0
    workdir = tmp_path / "run"
    processes = started(2, workdir, tmp_path, placement="nodes", **changes)
    ended = ends_of(processes)
    assert [each.code for each in ended] == [0, 0], ended
    assert "2 processes, each with nodes of its own" in ended[0].out
    assert_alike(workdir, alone)
    # What was saved is the whole graph: another epoch of one process ends where the other's does.
    for folder in (workdir, alone):
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "4")
        said = in_process(train_module.main, *options(small(folder, **changes)))
        assert "Resuming after epoch 3 of 4" in said.out
    assert_alike(workdir, alone)


def kept(workdir: Path) -> tuple[int, ...]:
    return checkpoint_epochs(workdir / "checkpoints")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_an_error_soon(tmp_path: Path) -> None:
    processes = started(2, tmp_path / "run", tmp_path, epochs=100_000)
    until = time.monotonic() + 200
    while not kept(tmp_path / "run"):
        assert time.monotonic() < until
        assert processes[0].poll() is None, ends_of(processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    ended = ends_of(processes)
    assert time.monotonic() - killed_at < 45  # of silence no more than 30
    assert ended[1].code == -signal.SIGKILL
    assert ended[0].code == 1
    message = r"failed: process 0 of 2 lost the others \(.*\); the same commands go on .*\n"
    assert re.fullmatch(message, ended[0].err), ended[0].err
    json.loads((tmp_path / "run" / "config.json").read_text())


@pytest.mark.slow
def test_what_the_first_process_finds_wrong_ends_all(tmp_path: Path, alone: Path) -> None:
    ended = ends_of(started(2, alone, tmp_path, seed=5))
    assert [each.code for each in ended] == [2, 2]
    for each in ended:
        assert each.err.startswith(f"error: workdir: got '{alone}'; allowed: a folder without")
        assert each.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--coordinator", "here"], "coordinator: got 'here'; allowed: HOST:PORT, the port from 1"),
        (["--coordinator", "a:0"], "coordinator: got 'a:0'; allowed: HOST:PORT, the port from 1"),
        (["--coordinator", "a:1"], "num_processes: got None; allowed: at least 1, together with"),
        (
            ["--coordinator", "a:1", "--num-processes", "2"],
            "process_id: got None; allowed: 0 to 1, another one for each process",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "process_id: got 2; allowed: 0 to 1, another one for each process",
        ),
        (["--process-id", "0"], "process_id: got 0; allowed: given together with coordinator"),
        (["--num-processes", "2"], "num_processes: got 2; allowed: given together with"),
        (
            ["--distributed", "--process-id", "1"],
            "process_id: got 1; allowed: nothing with distributed: the launcher says it",
        ),
    ],
)
def test_bad_words_about_hosts_are_refused(given: list[str], message: str, tmp_path: Path) -> None:
    ended = in_process(train_module.main, *given, *options(small(tmp_path / "run")))
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}")
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
