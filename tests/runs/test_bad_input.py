"""What the commands say about bad input and failed runs: one line, an exit code, no traces."""

import json
import re
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables
from runs import Ended, end_of, in_process, metrics, start
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import evaluate
from experiments import train as train_module
from ktg_jax.models.weights import save_node
from ktg_jax.training.checkpoint_reading import read_nodes

SMALL: dict[str, Any] = {
    "imports": "tiny_models",
    "models": "tiny tiny",
    "train-limit": 200,
    "epochs": 1,
    "batch-size": 32,
}
TINY_NODES = [{"model": "tiny"}, {"model": "tiny"}]
GRAPHS: dict[str, Any] = {
    "no_such_gate": {"nodes": TINY_NODES, "gates": [["through", "ajar"], ["cutoff", "through"]]},
    "wrong_shape": {"nodes": TINY_NODES, "gates": [["through", "through"], ["through"]]},
    "too_few_rows": {"nodes": TINY_NODES, "gates": [["through", "through"]]},
    "idle_target": {"nodes": TINY_NODES, "gates": [["cutoff", "cutoff"], ["cutoff", "through"]]},
    "frozen": {"nodes": TINY_NODES, "gates": [["through", "through"], ["cutoff", "cutoff"]]},
    "no_such_model": {
        "nodes": [{"model": "tiny"}, {"model": "tinny"}],
        "gates": [["through", "through"]] * 2,
    },
    "no_such_prior": {
        "nodes": [{"model": "tiny"}, {"model": "tiny", "prior": "gone"}],
        "gates": [["through", "through"]] * 2,
    },
    "misspelt": {"nodes": TINY_NODES[:1], "gate": [["through"]]},
    "no_such_field": {"nodes": TINY_NODES[:1], "gates": [["through"]], "temprature": 4},
    "bad_loss": {"nodes": TINY_NODES[:1], "gates": [[{"gate": "through", "weight": -1}]]},
    "no_stages": {
        "nodes": TINY_NODES,
        "gates": [["through", {"loss": "attention"}], ["through", "through"]],
    },
    "no_such_weights": {
        "nodes": [*TINY_NODES, {"model": "tiny", "weights": "gone"}],
        "gates": [["through", "cutoff", "through"], ["through"] * 3, ["cutoff"] * 3],
    },
    "ensemble": {
        "nodes": [*TINY_NODES, {"name": "both", "ensemble": ["tiny-0", "tiny-1"]}],
        "gates": [
            ["through", "cutoff", "through"],
            ["cutoff", "through", "cutoff"],
            ["cutoff"] * 3,
        ],
    },
    "good": {"nodes": TINY_NODES[:1], "gates": [["through"]]},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, most of which are bad input."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, graph in GRAPHS.items():
        (folder / f"{name}.json").write_text(json.dumps(graph))
    _write_archives(folder)
    cnn = ktg.build_model("cnn", 10)
    tiny, seven = (ktg.from_linen(Tiny(classes)) for classes in (10, 7))
    for name, model, fns, classes in (
        ("cnn", "cnn", cnn, 10),
        ("seven", "tiny", seven, 7),
        ("good", "tiny", tiny, 10),
    ):
        variables = random_variables(fns, jnp.zeros((1, 8, 8, 1)), seed=0)
        path = folder / f"{name}.safetensors"
        save_node(path, *variables, model=model, num_classes=classes, image_shape=(8, 8, 1))
    for name in ("good.json", "good.npz", "good.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name.replace("good", "truncated")).write_bytes(whole[: len(whole) // 2])
    return folder


def _write_archives(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    labels = np.arange(64) % 4
    good: dict[str, Any] = {"images": images, "labels": labels}
    archives = {
        "good": {},
        "grey": {"images": images[..., 0]},
        "floats": {"images": images / 255},
        "short": {"labels": labels[:60]},
        "other_size": {"test_images": images[:, :6, :6], "test_labels": labels},
        "negative": {"labels": labels - 1},
        "few_names": {"class_names": np.array(["a", "b"])},
    }
    for name, changes in archives.items():
        np.savez(folder / f"{name}.npz", **good | changes)
    np.savez(folder / "no_labels.npz", images=images)


def words(options: dict[str, Any]) -> list[str | Path]:
    chosen = {key: value for key, value in options.items() if value is not None}
    return [word for key, value in chosen.items() for word in (f"--{key}", *str(value).split())]


def assert_refused(ended: Ended, field: str, *parts: str) -> None:
    assert ended.code == 2, ended
    assert re.fullmatch(rf"error: {re.escape(field)}.*: got .*; allowed: .*\n", ended.err), ended
    for part in parts:
        assert part in ended.err


OPTIONS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"epochs": 0}, "epochs", ["got 0;", "at least 1"]),
    ({"epochs": 10**30}, "epochs", ["at most 2,147,483,647"]),
    ({"epochs": 10**4000}, "epochs", ["an integer of about 4,000 digits;", "at most 2,147,483,64"]),
    ({"epochs": 2**31 - 1}, "epochs", ["got 2147483647;", "at most 429,496,729, of 5 steps each"]),
    ({"batch-size": 2**70}, "batch_size", ["at most 2,147,483,647"]),
    ({"seed": 2**32}, "seed", ["got 4294967296;", "at most 4,294,967,295"]),
    ({"split-seed": 2**63}, "split_seed", ["at most 9,223,372,036,854,775,807"]),
    ({"train-limit": 10**30}, "train_limit", ["at most 2,147,483,647"]),
    ({"warmup-epochs": 10**30}, "warmup_epochs", ["at most 2,147,483,647"]),
    ({"image-size": 10**6}, "image_size", ["got 1000000;", "at most 4,096"]),
    ({"learning-rate": 1e300}, "learning_rate", ["got 1e+300;", "at most 1e+30"]),
    ({"weight-decay": 1e300}, "weight_decay", ["got 1e+300;", "at most 1e+30"]),
    ({"steps-per-call": 10**30}, "steps_per_call", ["at most 2,147,483,647"]),
    ({"cpu-devices": 10**6}, "cpu_devices", ["got 1000000;", "at most 1,024"]),
    ({"temperature": 1e300}, "temperature", ["got 1e+300;", "1e-15 to 1e+15"]),
    ({"graph": "a" * 5000, "models": None}, "graph", ["mutual, independent, distillation, chain"]),
    (
        {"graph": f"{{inputs}}:{'9' * 4000}", "models": None},
        "graph",
        ["the folder of a search"],
    ),
    ({"models": "tiny " * 101}, "nodes", ["got 101;", "at most 100 nodes"]),
    ({"models": "tiny resnet999999998"}, "models[1]", ["'resnet999999998'", "up to 1,202 layers"]),
    ({"batch-size": 0}, "batch_size", ["got 0;", "at least 1"]),
    ({"batch-size": 181}, "batch_size", ["got 181;", "180 training images"]),
    (
        {"batch-size": 33, "engine": "fused"},
        "batch_size",
        ["got 33;", "a multiple of 2, the number of devices"],
    ),
    ({"learning-rate": "nan"}, "learning_rate", ["got nan;", "finite", "above 0"]),
    ({"learning-rate": 0}, "learning_rate", ["got 0.0;", "above 0"]),
    ({"weight-decay": "inf"}, "weight_decay", ["got inf;", "finite"]),
    ({"val-fraction": 1.0}, "val_fraction", ["got 1.0;", "below 1"]),
    ({"val-fraction": "nan"}, "val_fraction", ["got nan;"]),
    ({"val-fraction": 0.001}, "val_fraction", ["got 0.001;", "10 classes"]),
    ({"train-limit": 5000}, "train_limit", ["got 5000;", "the number of images"]),
    ({"warmup-epochs": 1}, "warmup_epochs", ["got 1;", "below epochs"]),
    ({"seed": -1}, "seed", ["got -1;", "at least 0"]),
    ({"image-size": 1}, "image_size", ["got 1;"]),
    ({"temperature": 0}, "temperature", ["got 0.0;", "above 0"]),
    ({"imports": "no_such_module"}, "imports", ["no_such_module"]),
    ({"models": "tiny tinny"}, "models[1]", ["'tinny'", "cnn, resnet8", "tiny"]),
    ({"data": "digit"}, "data", ["'digit'", "digits, cifar10"]),
    ({"graph": "mutal"}, "graph", ["'mutal'", "mutual, independent, distillation, chain"]),
    ({"graph": "{inputs}/missing.json"}, "graph", ["missing.json", "JSON file"]),
    ({"graph": "distillation", "models": "tiny"}, "models", ["['tiny']", "teachers"]),
    ({"graph": "distillation"}, "nodes[1].weights", ["None", "weights for node tiny-1", "frozen"]),
    ({"weights": "none"}, "weights", ["['none']", "2 entries"]),
    ({"weights": "none {inputs}"}, "weights[1]", ["inputs", "DIR:name"]),
    ({"weights": "none {inputs}/missing.safetensors"}, "weights[1]", ["missing.safetensors"]),
    ({"weights": "none {inputs}/truncated.safetensors"}, "weights[1]", ["truncated.safetensors"]),
    (
        {"graph": "distillation", "weights": "none none"},
        "weights[1]",
        ["None", "weights for node tiny-1", "frozen"],
    ),
    ({"weights": "none {inputs}/cnn.safetensors"}, "weights of node 1", ["cnn.safetensors, a cnn"]),
    (
        {"weights": "none {inputs}/seven.safetensors"},
        "weights of node 1",
        ["seven.safetensors, a tiny", "classifier.bias: got (7,)", "shape (10,)"],
    ),
    ({"graph": "{inputs}/good.json"}, "models", ["['tiny', 'tiny']", "one a node", "(tiny-0)"]),
    (
        {"graph": "{inputs}/ensemble.json", "models": "tiny tiny tiny"},
        "models[2]",
        ["'tiny'", "ensemble: node both is no network"],
    ),
    (
        {
            "graph": "{inputs}/ensemble.json",
            "models": "tiny tiny ensemble",
            "weights": "none none pretrained",
        },
        "weights[2]",
        ["'pretrained'", "none: node both is no network"],
    ),
    (
        {"graph": "{inputs}/good.json", "models": "tinny"},
        "models[0]",
        ["'tinny'", "cnn, resnet8"],
    ),
]


@pytest.mark.parametrize(("options", "field", "parts"), OPTIONS, ids=lambda x: str(x)[:60])
def test_a_bad_option_is_refused_and_leaves_nothing(
    inputs: Path, tmp_path: Path, options: dict[str, Any], field: str, parts: list[str]
) -> None:
    given = {key: str(value).format(inputs=inputs) for key, value in options.items()}
    ended = in_process(train_module.main, *words(SMALL | given), "--workdir", tmp_path / "run")
    assert_refused(ended, field, *parts)
    assert list(tmp_path.iterdir()) == []


FILES: list[tuple[str, str, list[str]]] = [
    ("no_such_gate.json", "gates[0][1]", ["'ajar'", "through, cutoff, linear, correct"]),
    ("wrong_shape.json", "gates[1]", ["['through']", "2 rows of 2 gates"]),
    ("too_few_rows.json", "gates", ["2 rows of 2 gates"]),
    ("idle_target.json", "gates[0]", ["['cutoff', 'cutoff']", "target", "not cutoff"]),
    ("frozen.json", "nodes[1].weights", ["None", "tiny-1", "frozen"]),
    ("no_such_model.json", "nodes[1].model", ["'tinny'", "cnn, resnet8"]),
    ("no_such_prior.json", "nodes[1].prior", ["'gone'", "prior.safetensors"]),
    ("misspelt.json", "graph.gate", ["[['through']]", "did you mean 'gates'?"]),
    ("no_such_field.json", "graph.temprature", ["got 4;", "temperature"]),
    ("bad_loss.json", "gates[0][0].weight", ["got -1;", "a finite number of at least 0"]),
    ("no_such_weights.json", "nodes[2].weights", ["'gone'", "DIR:name"]),
    ("truncated.json", "graph", ["JSON"]),
    ("truncated.npz", "data", ["truncated.npz", "undamaged"]),
    ("missing.npz", "data", ["missing.npz", "a file that exists"]),
    ("no_labels.npz", "npz arrays", ["['images']", "labels"]),
    ("grey.npz", "npz images", ["uint8[64, 8, 8]", "uint8[n, h, w, c]"]),
    ("floats.npz", "npz images", ["float64[64, 8, 8, 1]", "uint8[n, h, w, c]"]),
    ("short.npz", "npz labels", ["got 60;", "64, one per image"]),
    ("other_size.npz", "test images", ["(6, 6, 1)", "(8, 8, 1)"]),
    ("negative.npz", "npz labels", ["got -1;", "0 to "]),
    ("few_names.npz", "npz class_names", ["<U1[2]", "4 or more"]),
]


@pytest.mark.parametrize(("name", "field", "parts"), FILES, ids=lambda x: str(x)[:40])
def test_a_bad_file_is_refused_and_leaves_nothing(
    inputs: Path, tmp_path: Path, name: str, field: str, parts: list[str]
) -> None:
    if name.endswith(".json"):
        options: dict[str, Any] = {"graph": inputs / name, "models": None}
    else:
        options = {"data": f"npz:{inputs / name}", "train-limit": None}
    ended = in_process(train_module.main, *words(SMALL | options), "--workdir", tmp_path / "run")
    assert_refused(ended, field, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_node_is_counted_with_those_that_were_left_out(inputs: Path, tmp_path: Path) -> None:
    """Node 1 of this graph is one that its target does not need."""
    options = {"graph": inputs / "no_such_weights.json", "models": None, "prune": ""}
    ended = in_process(train_module.main, *words(SMALL | options), "--workdir", tmp_path / "run")
    assert_refused(ended, "nodes[2].weights", "'gone'")


def test_a_network_without_the_stages_that_its_edges_need_is_refused(
    inputs: Path, tmp_path: Path
) -> None:
    options = {"graph": inputs / "no_stages.json", "models": None, "workdir": tmp_path / "run"}
    ended = in_process(train_module.main, *words(SMALL | options))
    assert_refused(ended, "stages of nodes[0]", "'Tiny'", "stage1_")
    assert list(tmp_path.iterdir()) == []


def test_weights_made_on_images_of_another_size_are_refused(inputs: Path, tmp_path: Path) -> None:
    options = {"weights": f"none {inputs / 'good.safetensors'}", "image-size": 6}
    ended = in_process(train_module.main, *words(SMALL | options), "--workdir", tmp_path / "run")
    assert_refused(ended, "weights of node 1", "hidden.kernel: got (64, 16)", "shape (36, 16)")
    assert list(tmp_path.iterdir()) == []


def test_without_a_workdir_bad_input_makes_none(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"weights": f"none {inputs / 'cnn.safetensors'}"}
    assert_refused(in_process(train_module.main, *words(SMALL | options)), "weights of node 1")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    ended = in_process(train_module.main, *words(SMALL), "--workdir", tmp_path / "run")
    assert_refused(ended, "workdir", str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"config": {"gra', '{"architectures": ["Bert"]}', "[]"])
def test_a_workdir_with_a_config_json_of_another_kind_is_refused(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    ended = in_process(train_module.main, *words(SMALL), "--workdir", tmp_path)
    assert_refused(ended, "workdir", str(tmp_path), "config.json")
    assert_refused(in_process(evaluate.main, tmp_path), "", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_a_missing_run_cannot_be_evaluated(tmp_path: Path) -> None:
    ended = in_process(evaluate.main, tmp_path / "missing")
    assert_refused(ended, "workdir", str(tmp_path / "missing"), "the folder of a run")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_themselves_end_with_one_line_and_code_2(inputs: Path, tmp_path: Path) -> None:
    bad_graph = {"graph": inputs / "no_such_gate.json", "models": None}
    processes = [
        start("experiments.train", *words(SMALL | bad_graph), cwd=tmp_path),
        start("experiments.evaluate", "runs/missing", cwd=tmp_path),
    ]
    trained, evaluated = (end_of(process) for process in processes)
    assert_refused(trained, "gates[0][1]", "'ajar'", "through, cutoff")
    assert_refused(evaluated, "workdir", "'runs/missing'", "the folder of a run")
    assert trained.out == evaluated.out == ""
    assert list(tmp_path.iterdir()) == []


# --- good input, failed runs


@pytest.mark.slow
def test_a_learning_rate_that_explodes_ends_with_one_line_and_code_1(tmp_path: Path) -> None:
    options = SMALL | {"learning-rate": 1e20, "epochs": 3}
    ended = in_process(train_module.main, *words(options), "--workdir", tmp_path / "run")
    assert ended.code == 1
    assert re.fullmatch(r"failed: step \d+, node tiny-\d: .* not finite.*\n", ended.err), ended.err


@pytest.mark.slow
def test_a_failed_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    options = SMALL | {"graph": "independent", "models": "tiny failing", "epochs": 4}
    command = [*words(options), "--workdir", tmp_path / "run"]
    ended = in_process(train_module.main, *command)
    assert ended.code == 1
    assert re.fullmatch(
        r"failed: step 13, node failing-1: loss not finite.*checkpoint.*\n", ended.err
    ), ended.err
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "result.json").exists()
    epoch, nodes = read_nodes(tmp_path / "run" / "checkpoints")
    assert epoch == 2
    chex.assert_tree_all_finite(nodes)
    assert in_process(evaluate.main, tmp_path / "run").code == 0

    again = in_process(train_module.main, *command)
    assert (again.code, again.err) == (1, ended.err)
    assert "Resuming after epoch 2" in again.out
