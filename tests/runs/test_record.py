"""The record command, and trainings that learn from what it wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import end_of, finished, in_process, metrics, options, result, small, start

import ktg_jax as ktg
from experiments import evaluate, record, train
from ktg_jax.recording import Recording

pytestmark = pytest.mark.slow

GATES = [["through", "through"], ["cutoff", "cutoff"]]
EPOCHS = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory, "to-record", models=("tiny",), graph="independent")


def recorded(source: str | Path, out: Path, *arguments: str | Path) -> str:
    ended = in_process(record.main, source, "--out", out, "--epochs", str(EPOCHS), *arguments)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def graph_file(path: Path, node: dict[str, Any]) -> Path:
    student = {"name": "student", "model": "tiny"}
    fields = {"nodes": [student, {"name": "teacher", **node}], "gates": GATES, "temperature": 2.0}
    path.write_text(json.dumps(fields))
    return path


def taught(workdir: Path, graph: Path, **changes: Any) -> list[dict[str, Any]]:
    config = small(workdir, graph=str(graph), models=(), epochs=EPOCHS, **changes)
    ended = in_process(train.main, *options(config))
    assert (ended.code, ended.err) == (0, "")
    return metrics(workdir)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["nodes"][0]["train_loss"] for line in lines]


def test_a_recorded_teacher_teaches_as_the_live_one(teacher: Path, tmp_path: Path) -> None:
    live = {"model": "tiny", "weights": str(teacher)}
    expected = losses(taught(tmp_path / "live", graph_file(tmp_path / "live.json", live)))
    for dtype, tolerance in (("float32", 1e-6), ("float16", 1e-3)):
        out = tmp_path / dtype
        said = recorded(teacher, out, "--dtype", dtype)
        assert "Recording tiny for 10 steps" in said
        assert "--data-seed 0, --batch-size 32 and at most 2 epochs" in said
        graph = graph_file(tmp_path / f"{dtype}.json", {"outputs": str(out)})
        found = taught(tmp_path / f"by-{dtype}", graph)
        np.testing.assert_allclose(losses(found), expected, rtol=tolerance)
    assert losses(found) != expected  # the last is rounded


def test_a_recorded_node_has_no_numbers_of_its_own_but_those_of_training(
    teacher: Path, tmp_path: Path
) -> None:
    recorded(teacher, tmp_path / "out")
    graph = graph_file(tmp_path / "graph.json", {"outputs": str(tmp_path / "out")})
    lines = taught(tmp_path / "run", graph)
    node = lines[-1]["nodes"][1]
    assert (node["val_accuracy"], node["val_loss"], node["train_loss"]) == (None, None, 0.0)
    assert 0 < node["train_accuracy"] < 1
    found = result(tmp_path / "run")
    student, its_teacher = found["nodes"]
    assert its_teacher["test_accuracy"] is None
    assert found["ensemble"]["test_accuracy"] == student["test_accuracy"]
    ended = in_process(evaluate.main, tmp_path / "run")
    assert ended.code == 0
    assert "teacher" not in ended.out
    again = taught(tmp_path / "run", graph)
    assert again == lines
    (tmp_path / "out").rename(tmp_path / "moved")  # a finished run does not need it any more
    assert taught(tmp_path / "run", graph) == lines


def test_one_recording_serves_every_initialisation(teacher: Path, tmp_path: Path) -> None:
    recorded(teacher, tmp_path / "out", "--data-seed", "7")
    graph = graph_file(tmp_path / "graph.json", {"outputs": str(tmp_path / "out")})
    first = taught(tmp_path / "0", graph, data_seed=7)
    second = taught(tmp_path / "1", graph, data_seed=7, seed=1)
    assert losses(first) != losses(second)
    assert [line["nodes"][1] for line in first] == [line["nodes"][1] for line in second]
    seventh = taught(tmp_path / "7", graph, seed=7)  # the seed of a run is its data's, too
    assert [line["nodes"][1] for line in seventh] == [line["nodes"][1] for line in first]


def test_a_static_recording_serves_any_augmentation(teacher: Path, tmp_path: Path) -> None:
    said = recorded(teacher, tmp_path / "out", "--static", "--crops", "3")
    assert "for 180 images" in said
    graph = graph_file(tmp_path / "graph.json", {"outputs": str(tmp_path / "out")})
    others: list[dict[str, Any]] = [{"seed": 3}, {"augment": False}, {"batch_size": 20}]
    for i, changes in enumerate(others):
        taught(tmp_path / str(i), graph, **changes)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, "data_seed: 0, now 1"),
        ({"batch_size": 16}, "batch_size: 32, now 16"),
        ({"augment": False}, "max_offset: 1, now 0"),
        ({"epochs": 3}, "steps: 10, now 15"),
        ({"train_limit": 150}, "images: 180, now 135"),
        ({"split_seed": 1}, "train_crc32"),
    ],
)
def test_a_recording_of_another_training_is_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], differing: str
) -> None:
    recorded(teacher, tmp_path / "out")
    graph = graph_file(tmp_path / "graph.json", {"outputs": str(tmp_path / "out")})
    config = small(tmp_path / "run", **{"graph": str(graph), "models": (), "epochs": 2} | changes)
    ended = in_process(train.main, *options(config))
    assert ended.code == 2
    assert ended.err.startswith("error: nodes[1].outputs: ")
    assert differing in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_node_of_a_run_and_an_exported_file_are_recorded_alike(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pair = finished(tmp_path_factory, "pair-to-record")
    file = tmp_path / "one.safetensors"
    in_process(evaluate.main, pair, "--export", file, "--node", "tiny-1")
    recorded(f"{pair}:tiny-1", tmp_path / "node")
    data = ("--data", "digits", "--train-limit", "200", "--batch-size", "32")
    recorded(file, tmp_path / "file", *data, "--imports", "tiny_models")
    node, from_file = (Recording(tmp_path / name) for name in ("node", "file"))
    assert node.header == from_file.header
    np.testing.assert_array_equal(node.rows(0, 10), from_file.rows(0, 10))
    recorded(pair, tmp_path / "target")
    assert Recording(tmp_path / "target").header != node.header


def test_the_same_command_goes_on_and_is_done_once(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recorded(teacher, out)
    assert "is complete; nothing to do" in recorded(teacher, out)
    text = (out / "recording.json").read_text()
    fields = json.loads(text)
    del fields["crc32"]
    (out / "recording.json").write_text(json.dumps(fields))
    shard = out / "shard-00000.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:100])
    recorded(teacher, out)
    assert shard.read_bytes() == before
    assert (out / "recording.json").read_text() == text


def test_what_the_options_say_takes_the_place_of_the_runs(teacher: Path, tmp_path: Path) -> None:
    recorded(teacher, tmp_path / "out", "--no-augment", "--batch-size", "20", "--top", "3")
    header = Recording(tmp_path / "out").header
    assert (header.of["max_offset"], header.of["flip"], header.top) == (0, False, 3)
    assert header.row_shape == (20,)
    recorded(teacher, tmp_path / "augmented", "--augment")
    assert Recording(tmp_path / "augmented").header.of["max_offset"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there"], "out: got None"),
        (["--out", "new", "no run"], "source: got 'no run'"),
        (["--out", "new", "{run}:x"], "node: got 'x'; allowed: tiny-0"),
        (["--out", "new", "{run}", "--model", "tiny"], "model: got 'tiny'; allowed: nothing"),
        (["--out", "new", "{run}", "--epochs", "0"], "epochs: got 0"),
        (["--out", "new", "{run}", "--crops", "2"], "crops: got 2; allowed: 1, or more with"),
        (["--out", "new", "{run}", "--top", "10"], "top: got 10; allowed: 1 to 9"),
        (["--out", "new", "{run}", "--batch-size", "181"], "batch_size: got 181"),
        (["--out", "new", "{run}", "--train-limit", "5"], "train_limit: got 5"),
        (["--out", "full", "{run}"], "out: got 'full'; allowed: a new folder"),
        (["--out", "new", "file.safetensors"], "data: got None"),
        (["--out", "new", "file.safetensors", "--data", "digits"], "weights: got"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file.safetensors").write_bytes(b"nothing")
    words = [word.format(run=teacher) for word in arguments]
    ended = in_process(record.main, *words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {message}"), ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_damage_is_found_before_anything_is_trained(teacher: Path, tmp_path: Path) -> None:
    recorded(teacher, tmp_path / "out")
    graph = graph_file(tmp_path / "graph.json", {"outputs": str(tmp_path / "out")})
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "out" / "shard-00000.safetensors").unlink()
    config = small(tmp_path / "run", graph=str(graph), models=(), epochs=EPOCHS)
    ended = in_process(train.main, *options(config))
    assert ended.code == 2
    assert "shard-00000.safetensors is missing" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_killed_recording_goes_on(teacher: Path, tmp_path: Path) -> None:
    words = (teacher, "--out", tmp_path / "out", "--epochs", "3000", "--dtype", "float32")
    process = start("experiments.record", *words, cwd=tmp_path)
    while not (tmp_path / "out" / "shard-00000.safetensors").is_file():
        assert process.poll() is None
    process.kill()
    end_of(process)
    assert not is_complete(tmp_path / "out")
    said = in_process(record.main, *words).out
    assert "Going on after" in said
    again = tmp_path / "again"
    in_process(record.main, teacher, "--out", again, *words[3:])
    found, expected = Recording(tmp_path / "out"), Recording(again)
    np.testing.assert_array_equal(found.rows(0, 15000), expected.rows(0, 15000))


def is_complete(folder: Path) -> bool:
    try:
        Recording(folder)
    except ktg.InputError:
        return False
    return True
