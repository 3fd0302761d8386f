"""The evaluation command: its numbers, and what it exports."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import end_of, finished, in_process, metrics, result, start, train
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import evaluate
from ktg_jax.data.dataset import Split
from ktg_jax.data.sources import load_dataset
from ktg_jax.models.weights import load_node

NAMES = ("tiny-0", "tiny-1")
EARLY_BEST: dict[str, Any] = {"learning_rate": 1.0, "seed": 2, "epochs": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its best epoch not the last."""
    workdir = finished(tmp_path_factory, "evaluate", **EARLY_BEST)
    found = result(workdir)
    assert found["target"]["best"]["epoch"] < found["epochs"]
    return workdir


def table(out: str) -> dict[str, tuple[float, float]]:
    """What was printed: loss and accuracy (in per cent) of every node and the ensemble."""
    rows = re.findall(r"^ *(\S+) .* (\d+\.\d{4}) +(\d+\.\d\d) % *$", out, re.MULTILINE)
    return {name: (float(loss), float(accuracy)) for name, loss, accuracy in rows}


def evaluated(workdir: Path, *arguments: str | Path) -> dict[str, tuple[float, float]]:
    ended = in_process(evaluate.main, workdir, *arguments)
    assert (ended.code, ended.err) == (0, "")
    return table(ended.out)


def split_of(name: str) -> Split:
    dataset = load_dataset("digits", train_limit=200, val_fraction=0.1)
    found = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[name]
    assert found is not None
    return found


def logits_of(file: Path, split: Split) -> np.ndarray:
    fns, params, model_state = load_node(file)
    images = jnp.asarray(split.images / np.float32(255))
    logits, _ = fns.apply(params, model_state, images, False)
    return np.asarray(logits, np.float64)


def loss_and_accuracy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    loss = -np.mean(log_probabilities[np.arange(len(labels)), labels])
    return float(loss), 100 * float(np.mean(logits.argmax(1) == labels))


def assert_close(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    """The same to the digits that are printed."""
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], atol=0.006)


# --- numbers


@pytest.mark.parametrize("checkpoint", ["last", "best"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_the_numbers_are_those_of_the_result(run: Path, split: str, checkpoint: str) -> None:
    found = evaluated(run, "--split", split, "--checkpoint", checkpoint)
    stored = result(run)
    entries = {node["name"]: node for node in stored["nodes"]} | {"ensemble": stored["ensemble"]}
    assert found.keys() == entries.keys()
    for name, numbers in found.items():
        entry = entries[name] if checkpoint == "last" else entries[name]["best"]
        assert numbers == (
            float(f"{entry[f'{split}_loss']:.4f}"),
            float(f"{100 * entry[f'{split}_accuracy']:.2f}"),
        )


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_ensemble_is_the_sum_of_the_exported_nodes_logits(
    run: Path, tmp_path: Path, split: str
) -> None:
    images = split_of(split)
    logits = []
    for name in NAMES:
        file = tmp_path / f"{name}.safetensors"
        found = evaluated(run, "--export", file, "--node", name, "--split", split)
        logits.append(logits_of(file, images))
        assert_close(loss_and_accuracy(logits[-1], images.labels), found[name])
    assert_close(loss_and_accuracy(logits[0] + logits[1], images.labels), found["ensemble"])


def test_it_says_what_was_evaluated(run: Path) -> None:
    best = result(run)["target"]["best"]["epoch"]
    for arguments, expected in (
        ([], "epoch 5, 359 test images"),
        (["--split", "val"], "epoch 5, 20 val images"),
        (["--split", "train", "--checkpoint", "best"], f"epoch {best}, 180 train images"),
    ):
        assert f"{run}, {expected}:" in in_process(evaluate.main, run, *arguments).out


@pytest.mark.slow
def test_a_run_in_mixed_precision_is_evaluated_as_it_was_in_training(tmp_path: Path) -> None:
    train(tmp_path / "run", mixed_precision=True)
    entries = {node["name"]: node for node in result(tmp_path / "run")["nodes"]}
    for name, (loss, _) in evaluated(tmp_path / "run").items():
        if name != "ensemble":
            assert loss == float(f"{entries[name]['test_loss']:.4f}")


def test_an_unfinished_run_can_be_evaluated(run: Path, tmp_path: Path) -> None:
    """The line of an epoch is written before its checkpoint is there, and may be half-written."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "5")
    (workdir / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 6, "st')
    before = sorted(workdir.rglob("*"))
    assert "epoch 4, 359 test images" in in_process(evaluate.main, workdir).out
    ended = in_process(evaluate.main, workdir, "--checkpoint", "best", "--split", "val")
    assert ended.code == 0, ended.err
    scores = [record["nodes"][0]["val_accuracy"] for record in metrics(run)]
    assert f"epoch {1 + scores.index(max(scores))}, " in ended.out
    assert sorted(workdir.rglob("*")) == before


# --- exports


def test_an_exported_node_is_the_runs_node_without_this_library(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "target.safetensors"
    ended = in_process(evaluate.main, run, "--export", file, "--checkpoint", "best")
    assert (ended.code, ended.err) == (0, "")
    assert f"Wrote {file}." in ended.out
    assert list(tmp_path.iterdir()) == [file]
    split = split_of("test")
    variables = flax.traverse_util.unflatten_dict(load_file(file), sep=".")
    logits = Tiny(10).apply(variables, split.images / np.float32(255), train=False)
    assert isinstance(logits, jax.Array)
    np.testing.assert_array_equal(np.asarray(logits, np.float64), logits_of(file, split))
    best = result(run)["target"]["best"]
    expected = best["test_loss"], 100 * best["test_accuracy"]
    assert_close(loss_and_accuracy(np.asarray(logits, np.float64), split.labels), expected)
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata()
    assert (about["node"], about["model"]) == ("tiny-0", "tiny")
    assert json.loads(about["epoch"]) == best["epoch"]
    assert json.loads(about["class_names"]) == [str(digit) for digit in range(10)]
    assert about["input"] == "float32 [B, 8, 8, 1], grey, uint8 divided by 255"


def test_a_loaded_node_classifies_images_as_they_are_stored(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "target.safetensors"
    ended = in_process(evaluate.main, run, "--export", file)
    assert "It takes uint8 images divided by 255." in ended.out
    split, (fns, params, model_state) = split_of("test"), load_node(file)
    logits, _ = fns.apply(params, model_state, jnp.asarray(split.images), False)
    found = loss_and_accuracy(np.asarray(logits, np.float64), split.labels)
    target = result(run)["target"]
    assert_close(found, (target["test_loss"], 100 * target["test_accuracy"]))


def test_without_the_data_a_node_is_exported_all_the_same(run: Path, tmp_path: Path) -> None:
    workdir, file = tmp_path / "run", tmp_path / "target.safetensors"
    shutil.copytree(run, workdir)
    content = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(content.replace('"digits"', '"npz:gone.npz"'))
    ended = in_process(evaluate.main, workdir, "--export", file)
    assert ended.code == 2
    assert "gone.npz" in ended.err
    with safe_open(file, framework="numpy") as opened:
        assert opened.metadata()["node"] == "tiny-0"
        assert "class_names" not in opened.metadata()


@pytest.mark.slow
def test_the_command_finds_models_of_imported_modules(run: Path, tmp_path: Path) -> None:
    ended = end_of(start("experiments.evaluate", run, "--split", "val", cwd=tmp_path))
    assert (ended.code, ended.err) == (0, "")
    assert table(ended.out) == evaluated(run, "--split", "val")


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--node", "tiny-1"], ["node", "'tiny-1'", "--export"]),
        (["--export", "x.safetensors", "--node", "tiny-7"], ["node", "tiny-7", "tiny-0, tiny-1"]),
        (["--export", "x.npz"], ["export", "x.npz", ".safetensors"]),
        (["--export", "gone/x.safetensors"], ["export", "gone/x.safetensors"]),
    ],
)
def test_a_bad_export_is_refused(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = in_process(evaluate.main, run, *arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {parts[0]}: got ")
    assert ended.err.count("\n") == 1
    for part in parts:
        assert part in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_validation_images_there_is_nothing_to_choose_by(tmp_path: Path) -> None:
    train(tmp_path / "run", val_fraction=0.0, models=("tiny",), epochs=1)
    for arguments, field in (
        (["--checkpoint", "best"], "checkpoint"),
        (["--split", "val"], "split"),
    ):
        ended = in_process(evaluate.main, tmp_path / "run", *arguments)
        assert ended.code == 2
        assert ended.err.startswith(f"error: {field}: got '{arguments[1]}'; allowed: ")
        assert ended.err.count("\n") == 1


@pytest.mark.slow
def test_other_data_than_the_runs_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, workdir = tmp_path / "data.npz", tmp_path / "run"

    def write(size: int, classes: int) -> None:
        images = rng.integers(0, 256, (80, size, size, 1), np.uint8)
        labels = np.arange(80) % classes
        np.savez(data, images=images, labels=labels, test_images=images, test_labels=labels)

    write(8, 4)
    changes: dict[str, Any] = {"data": f"npz:{data}", "train_limit": None, "models": ("tiny",)}
    train(workdir, epochs=1, **changes)
    for size, classes in ((8, 5), (6, 4)):
        write(size, classes)
        ended = in_process(evaluate.main, workdir)
        assert ended.code == 2
        assert ended.err.startswith("error: data")
        assert ended.err.count("\n") == 1


@pytest.mark.slow
def test_a_run_without_a_readable_checkpoint_fails_with_one_line(run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        shutil.rmtree(folder / "nodes")
    ended = in_process(evaluate.main, workdir)
    assert ended.code == 1
    assert re.fullmatch("failed: checkpoint 5 is damaged .*\n", ended.err), ended.err
    shutil.rmtree(workdir / "checkpoints")
    ended = in_process(evaluate.main, workdir)
    assert ended.code == 1
    assert re.fullmatch("failed: .*holds no checkpoint.*\n", ended.err), ended.err


def test_models_of_a_registry_that_lacks_them_are_named(run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    graph = ktg.Graph.load(workdir / "graph.json").to_json()
    (workdir / "graph.json").write_text(graph.replace('"model": "tiny"', '"model": "unheard_of"'))
    ended = in_process(evaluate.main, workdir)
    assert ended.code == 2
    assert ended.err.startswith("error: model: got 'unheard_of'; allowed: ")
