"""Runs whose nodes want their images in a way of their own, and networks of files."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Ended, in_process, options, result, small

import ktg_jax as ktg
from experiments import evaluate, record, train
from ktg_jax.data.sources import load_dataset
from ktg_jax.inputs import Input
from ktg_jax.models.input import statistics
from ktg_jax.models.weights import load_node, read_node

pytestmark = pytest.mark.slow

SIZED = '{"mean": 0.3, "std": [0.4], "size": 16}'


def trained(workdir: Path, **changes: Any) -> Ended:
    return in_process(train.main, *options(small(workdir, epochs=1, **changes)))


def accuracies(ended: Ended) -> list[float]:
    assert (ended.code, ended.err) == (0, "")
    return [float(found) for found in re.findall(r"(\d+\.\d\d) +%", ended.out)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One node sees the images by their statistics, the other of another size."""
    workdir = tmp_path_factory.mktemp("inputs") / "run"
    assert trained(workdir, inputs=("data", SIZED)).code == 0
    return workdir


def test_a_run_knows_how_its_nodes_see_images(run: Path) -> None:
    nodes = json.loads((run / "graph.json").read_text())["nodes"]
    assert [node["input"] for node in nodes] == ["data", {"mean": [0.3], "std": [0.4], "size": 16}]
    dataset = load_dataset("digits", train_limit=200, val_fraction=0.1)
    facts = json.loads((run / "config.json").read_text())["config"]["input_facts"]
    assert facts == {"tiny-0": statistics(dataset.train.images).to_json()}
    assert "nothing to do" in trained(run, inputs=("data", SIZED)).out
    assert "differing: graph.nodes" in trained(run, inputs=("none", SIZED)).err


def test_it_is_evaluated_as_it_was_trained(run: Path) -> None:
    found = result(run)
    expected = [node["test_accuracy"] for node in (*found["nodes"], found["ensemble"])]
    printed = accuracies(in_process(evaluate.main, run))
    np.testing.assert_allclose(printed, 100 * np.array(expected), atol=0.006)


def test_an_exported_node_takes_its_input_along(run: Path, tmp_path: Path) -> None:
    test = load_dataset("digits").test
    assert test is not None
    for node, size in (("tiny-0", None), ("tiny-1", 16)):
        file = tmp_path / f"{node}.safetensors"
        in_process(evaluate.main, run, "--export", file, "--node", node)
        weights, about = read_node(file)
        assert weights.input is not None
        assert (weights.input.size, about["image_shape"]) == (size, [8, 8, 1])
        fns, params, state = load_node(file)
        logits, _ = fns.apply(params, state, jnp.asarray(test.images), False)
        accuracy = 100 * np.mean(np.argmax(logits, 1) == test.labels)
        index = int(node[-1])
        expected = result(run)["nodes"][index]["test_accuracy"]
        np.testing.assert_allclose(accuracy, 100 * expected, atol=1e-4)
        of_file = in_process(evaluate.main, file, "--data", "digits", "--imports", "tiny_models")
        np.testing.assert_allclose(accuracies(of_file), [accuracy], atol=0.006)


def test_weights_are_used_as_they_were_trained(run: Path, tmp_path: Path) -> None:
    wanted = statistics(load_dataset("digits", train_limit=200, val_fraction=0.1).train.images)
    how: dict[str, Any] = {"graph": "distillation", "weights": ("none", str(run))}
    ended = trained(tmp_path / "other", **how)
    assert ended.code == 2
    assert "nodes[1].input: got {'mean': [0.0], 'std': [1.0]}" in ended.err
    assert json.dumps(wanted.to_json()) in ended.err
    ended = trained(tmp_path / "same", **how, inputs=("none", json.dumps(wanted.to_json())))
    assert (ended.code, ended.err) == (0, "")
    same_data = trained(tmp_path / "data", **how, inputs=("none", "data"))
    assert (same_data.code, same_data.err) == (0, "")
    teachers = [result(tmp_path / name)["nodes"][1] for name in ("same", "data")]
    assert teachers[0]["test_accuracy"] == teachers[1]["test_accuracy"]
    assert teachers[0]["test_accuracy"] == result(run)["nodes"][0]["test_accuracy"]


def test_what_is_pretrained_is_trained_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    how: dict[str, Any] = {"graph": "distillation", "weights": ("none", "pretrained")}
    for given in ("half", "none", "half"):
        ended = trained(tmp_path / given, **how, inputs=("none", given))
        assert (ended.code, ended.err) == (0, "")
    found = list((tmp_path / "cache" / "pretrained").glob("*/graph.json"))
    inputs = [json.loads(path.read_text())["nodes"][0].get("input") for path in found]
    assert sorted(inputs, key=str) == [None, "half"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ("half",)}, "inputs: got ['half']; allowed: 2 entries, one a model, or none"),
        ({"inputs": ("none", "hal")}, "inputs[1]: got 'hal'; allowed: imagenet"),
        ({"inputs": ("none", '{"std": 0}')}, "inputs[1].std: got [0.0]; allowed: numbers above 0"),
        ({"inputs": ("none", "{")}, "inputs[1]: got '{'; allowed: JSON"),
        ({"inputs": ("imagenet", "none")}, "nodes[0].input.mean: got [0.485, 0.456, 0.406]"),
    ],
)
def test_a_bad_input_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    ended = trained(tmp_path / "run", **changes)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data: got None; allowed: the data to evaluate on"),
        (["--data", "digits", "--checkpoint", "best"], "checkpoint: got 'best'; allowed: last"),
        (["--data", "digits", "--model", "cnn"], "model: got 'cnn'; allowed: tiny, which the file"),
        (["--data", "digits", "--input", "half"], "input: got 'half'; allowed: nothing: the file"),
        (["--data", "digits", "--image-size", "16"], "image_size: got 16; allowed: 8"),
        (["--data", "digits", "--split", "val"], "split: got 'val'; allowed: a split that"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    file = tmp_path / "node.safetensors"
    params, state = ktg.build_model("tiny", 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    how: dict[str, Any] = {"model": "tiny", "num_classes": 10, "image_shape": (8, 8, 1)}
    ktg.save_node(file, params, state, input=Input((0.5,)), **how)
    ended = in_process(evaluate.main, file, "--imports", "tiny_models", *arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}"), ended.err
    assert ended.err.count("\n") == 1
    of_run = in_process(evaluate.main, run, "--input", "half")
    assert of_run.err.startswith("error: input: got 'half'; allowed: nothing: a run knows it")


# --- state dicts of PyTorch


def test_a_state_dict_is_exported_evaluated_recorded_and_learned_from(tmp_path: Path) -> None:
    small_resnet: dict[str, Any] = {"models": ("resnet8_4",), "graph": "independent"}
    assert trained(tmp_path / "run", **small_resnet, inputs=("half",)).code == 0
    accuracy = 100 * result(tmp_path / "run")["target"]["test_accuracy"]
    for layout in ("pytorch", "akamaster"):
        file = tmp_path / f"{layout}.safetensors"
        words = ("--export", file, "--layout", layout)
        assert "Wrote" in in_process(evaluate.main, tmp_path / "run", *words).out
        how = ("--model", "resnet8_4", "--input", "half", "--data", "digits")
        ended = in_process(evaluate.main, file, *how)
        np.testing.assert_allclose(accuracies(ended), [accuracy], atol=0.006)
        assert f"is a resnet8_4 in PyTorch's layout {layout}." in ended.out
    other = in_process(evaluate.main, file, *how[:2], *how[4:])  # 0 to 1: it sees other images
    assert accuracies(other) != [round(accuracy, 2)]
    limited = ("--train-limit", "200", "--batch-size", "32", "--epochs", "1")
    ended = in_process(record.main, file, *how, *limited, "--out", tmp_path / "recording")
    assert (ended.code, ended.err) == (0, "")
    teacher = {"graph": "distillation", "models": ("tiny", "resnet8_4")}
    ended = trained(
        tmp_path / "taught", **teacher, weights=("none", str(file)), inputs=("none", "half")
    )
    assert (ended.code, ended.err) == (0, "")
    found = result(tmp_path / "taught")["nodes"][1]["test_accuracy"]
    np.testing.assert_allclose(100 * found, accuracy, atol=1e-4)
    assert (
        "nothing to do"
        in trained(
            tmp_path / "taught", **teacher, weights=("none", str(file)), inputs=("none", "half")
        ).out
    )


def test_a_state_dict_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    network = ktg.build_model("resnet8_4", 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ktg.save_state_dict(file, *network, "resnet8_4")
    (tmp_path / "node.pth").write_bytes(b"PK")
    for words, message in (
        ([file], "model: got None; allowed: the name of the model"),
        ([file, "--model", "resnet14_4"], "weights: got "),
        ([file, "--model", "resnet"], "model: got 'resnet'"),
        ([file, "--model", "resnet8_4", "--input", "imagenet"], "input.mean: got "),
        ([tmp_path / "node.pth", "--model", "resnet8_4"], "weights: got "),
    ):
        ended = in_process(evaluate.main, *words, "--data", "digits")
        assert ended.code == 2
        assert ended.err.startswith(f"error: {message}"), ended.err
        assert ended.err.count("\n") == 1
    assert "torch.load(" in ended.err
    pickled = in_process(evaluate.main, tmp_path / "node.pth")  # before anything else is asked
    assert "torch.load(" in pickled.err
    graph: dict[str, Any] = {"graph": "distillation", "models": ("tiny", "resnet14_4")}
    ended = trained(tmp_path / "run", **graph, weights=("none", str(file)))
    assert ended.code == 2
    assert "weights[1]" in ended.err
    assert "the parts of a resnet14_4" in ended.err
    assert not (tmp_path / "run").exists()
