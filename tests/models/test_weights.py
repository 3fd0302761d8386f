"""One node's weights: read from runs and files, put into a state, exported and loaded."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_variables import random_variables
from runs import compiled_once
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import Tiny, dropping

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.io.trees import flatten
from ktg_jax.models.weights import load_node, save_node
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.warm_start import load_weights, with_weights

IMAGES = jnp.asarray(np.random.default_rng(0).random((5, 8, 8, 1), np.float32))
NAMES = ("student", "teacher")
TINY = ktg.build_model("tiny", 10)
TINY_WEIGHTS = random_variables(TINY, IMAGES, seed=1)


def state_of(*seeds: int) -> ktg.GraphState:
    variables = [random_variables(TINY, IMAGES, seed) for seed in seeds]
    params, model_state = zip(*variables, strict=True)
    opt_state = tuple(optax.sgd(0.1, momentum=0.9).init(p) for p in params)
    return ktg.GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))


def make_run(folder: Path, *epochs: ktg.GraphState) -> Path:
    """A run's folder with as much as its weights need."""
    folder.mkdir()
    nodes = tuple(ktg.Node("tiny", name) for name in NAMES)
    ktg.graphs.mutual(nodes).save(folder / "graph.json")
    checkpoints = Checkpoints(folder / "checkpoints")
    for epoch, state in enumerate(epochs, start=1):
        checkpoints.save(epoch, state, NAMES, None)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("weights") / "run:1", state_of(1, 2), state_of(3, 4))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "node.safetensors"
    save_node(path, *TINY_WEIGHTS, model="tiny", num_classes=10, image_shape=(8, 8, 1))
    return path


def refused(field: str) -> AbstractContextManager[pytest.ExceptionInfo[InputError]]:
    return pytest.raises(InputError, match=f"^{field}: got ")


# --- reading


@pytest.mark.parametrize(("name", "seed"), [("", 3), (":student", 3), (":teacher", 4)])
def test_a_runs_weights_are_those_of_its_last_checkpoint(run: Path, name: str, seed: int) -> None:
    weights = load_weights(f"{run}{name}")
    params, model_state = random_variables(TINY, IMAGES, seed)
    assert weights.model == "tiny"
    assert weights.source == f"{run}{name}"
    chex.assert_trees_all_equal(weights.params, flatten(params))
    chex.assert_trees_all_equal(weights.model_state, flatten(model_state))


def test_a_node_that_the_run_does_not_have_is_refused_with_those_it_has(run: Path) -> None:
    with refused("weights") as error:
        load_weights(f"{run}:assistant")
    assert "assistant" in str(error.value)
    assert "student, teacher" in str(error.value)


def test_what_is_neither_a_run_nor_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("missing", "missing:node", str(tmp_path / "empty"), "weights.npz", ""):
        with refused("weights") as error:
            load_weights(source)
        assert repr(source) in str(error.value)
        assert ".safetensors" in str(error.value)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with refused("weights"):
        load_weights(str(make_run(tmp_path / "run")))


def test_an_exported_file_can_be_read_as_weights(exported: Path) -> None:
    weights = load_weights(str(exported))
    assert weights.model == "tiny"
    chex.assert_trees_all_equal(weights.params, flatten(TINY_WEIGHTS[0]))
    chex.assert_trees_all_equal(weights.model_state, flatten(TINY_WEIGHTS[1]))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_in_one_line(exported: Path, size: int) -> None:
    exported.write_bytes(exported.read_bytes()[:size])
    for read in (load_weights, load_node):
        with refused("weights") as error:
            read(str(exported))
        assert str(exported) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / f"{name}.safetensors" for name in ("missing", "folder", "fifo")):
        with refused("weights") as error:
            load_weights(str(path))
        assert path.name in str(error.value)


@pytest.mark.parametrize("about", [None, {"model": "tiny"}])
def test_a_safetensors_file_of_another_origin_is_refused(
    tmp_path: Path, about: dict[str, str] | None
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"kernel": np.zeros((2, 2))}, path, metadata=about)
    with refused("weights") as error:
        load_node(path)
    assert "other.safetensors" in str(error.value)


# --- into a state


def test_weights_replace_one_nodes_params_and_statistics_alone(run: Path) -> None:
    before = state_of(7, 8)
    after = with_weights(before, 1, load_weights(f"{run}:teacher"))
    expected = state_of(7, 4)
    chex.assert_trees_all_equal_structs(after, before)
    chex.assert_trees_all_equal(after.params, expected.params)
    chex.assert_trees_all_equal(after.model_state, expected.model_state)
    chex.assert_trees_all_equal(after.opt_state, before.opt_state)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ktg.build_model("tiny", 7), "classifier.bias: got (10,); allowed: shape (7,)"),
        (ktg.build_model("cnn", 10), "no classifier.kernel|no stage1_conv.kernel|shape"),
    ],
    ids=["classes", "architecture"],
)
def test_weights_of_another_network_are_refused(
    run: Path, other: ktg.NodeFns, expected: str
) -> None:
    params, model_state = random_variables(other, IMAGES, seed=0)
    state = ktg.GraphState((params,), (model_state,), (None,), jnp.zeros((), jnp.int32))
    with pytest.raises(InputError, match=r"^weights of node 0 \(.*, a tiny\)") as error:
        with_weights(state, 0, load_weights(str(run)))
    assert any(part in str(error.value) for part in expected.split("|"))
    assert "\n" not in str(error.value)


# --- a node alone


def test_an_exported_node_comes_back(exported: Path) -> None:
    fns, params, model_state = load_node(exported)
    chex.assert_trees_all_equal_structs((params, model_state), TINY_WEIGHTS)
    chex.assert_trees_all_equal((params, model_state), TINY_WEIGHTS)
    expected, _ = TINY.apply(*TINY_WEIGHTS, IMAGES, False)
    logits, unchanged = fns.apply(params, model_state, IMAGES, False)
    assert logits.shape == (5, 10)
    np.testing.assert_array_equal(logits, expected)
    chex.assert_trees_all_equal(unchanged, model_state)


def test_an_exported_node_can_be_used_without_this_library(exported: Path) -> None:
    variables = flax.traverse_util.unflatten_dict(load_file(exported), sep=".")
    assert set(variables) == {"params", "batch_stats"}
    logits = Tiny(10).apply(variables, IMAGES, train=False)
    np.testing.assert_array_equal(logits, TINY.apply(*TINY_WEIGHTS, IMAGES, False)[0])


def test_an_exported_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "node.safetensors"
    about = {"node": "student", "epoch": "7"}
    fixed: dict[str, Any] = {"model": "tiny", "num_classes": 10, "image_shape": (8, 8, 1)}
    save_node(path, *TINY_WEIGHTS, **fixed, about=about)
    with safe_open(path, framework="numpy") as file:
        texts = file.metadata()
    assert texts["model"] == "tiny"
    assert json.loads(texts["num_classes"]) == 10
    assert json.loads(texts["image_shape"]) == [8, 8, 1]
    assert {key: texts[key] for key in about} == about


def test_an_exported_file_says_what_images_it_takes(exported: Path, tmp_path: Path) -> None:
    with safe_open(exported, framework="numpy") as file:
        texts = file.metadata()
    assert texts["input"] == "float32 [B, 8, 8, 1], grey, uint8 divided by 255"
    assert json.loads(texts["input_divisor"]) == 255
    path = tmp_path / "colour.safetensors"
    fixed: dict[str, Any] = {"model": "tiny", "num_classes": 10, "image_shape": (32, 30, 3)}
    save_node(path, *TINY_WEIGHTS, **fixed, input_divisor=1.0)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["input"] == "float32 [B, 32, 30, 3], RGB, uint8 divided by 1"


def rewritten(path: Path, **texts: str | None) -> Path:
    """The same file with other texts; None: without."""
    with safe_open(path, framework="numpy") as file:
        known = file.metadata() | texts
    save_file(load_file(path), path, metadata={k: v for k, v in known.items() if v is not None})
    return path


def test_a_loaded_node_takes_stored_images_and_divides_them_itself(exported: Path) -> None:
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8))
    by_hand, _ = TINY.apply(*TINY_WEIGHTS, pixels / jnp.float32(255), False)
    # Files of before say nothing of it, and mean the same.
    for path in (exported, rewritten(exported, input=None, input_divisor=None)):
        fns, params, model_state = load_node(path)
        np.testing.assert_allclose(
            fns.apply(params, model_state, pixels, False)[0], by_hand, rtol=1e-5, atol=1e-5
        )
    fns, params, model_state = load_node(rewritten(exported, input_divisor="1"))
    undivided, _ = TINY.apply(*TINY_WEIGHTS, pixels.astype(jnp.float32), False)
    logits, _ = fns.apply(params, model_state, pixels, False)
    np.testing.assert_allclose(logits, undivided, rtol=1e-5)
    with pytest.raises(InputError, match=r"^images: got 'int32"):
        fns.apply(params, model_state, pixels.astype(jnp.int32), False)


BAD_TEXTS = [
    ("num_classes", "ten"),
    ("num_classes", "9" * 5000),
    ("num_classes", "2.5"),
    ("num_classes", "0"),
    ("num_classes", "true"),
    ("num_classes", "1000000000000"),
    ("num_classes", None),
    ("image_shape", "[8, 8"),
    ("image_shape", "8"),
    ("image_shape", "[8, 8, 0]"),
    ("image_shape", "[8, 8, null]"),
    ("image_shape", "[1000000000, 1000000000, 3]"),
    ("image_shape", "[1000000, 1000000, 3]"),
    ("image_shape", "[" * 100_000),
    ("input_divisor", "0"),
    ("input_divisor", "NaN"),
    ("input_divisor", "1e999"),
    ("model", ""),
    ("model", "a\nb"),
    ("model", "x" * 1000),
]


@pytest.mark.parametrize(("field", "text"), BAD_TEXTS, ids=lambda x: str(x)[:20])
def test_damaged_texts_are_refused_in_one_line(
    exported: Path, field: str, text: str | None
) -> None:
    rewritten(exported, **{field: text})
    for read in (load_weights, load_node):
        with refused("weights") as error:
            read(str(exported))
        message = str(error.value)
        assert f"({field}: {(text or '')[:60]!r})" in message
        assert "\n" not in message


def test_an_impossible_network_is_refused_before_it_is_built(exported: Path) -> None:
    for model in ("resnet999999998", "wrn999999994_2", "resnet8_99999999999"):
        with refused("model") as error:
            load_node(rewritten(exported, model=model))
        assert f"got '{model}'" in str(error.value)
        assert str(error.value).endswith(f"; in {exported}")


def test_an_nnx_node_comes_back_with_its_random_stream(tmp_path: Path) -> None:
    path = tmp_path / "node.safetensors"
    fns = dropping(10)
    with compiled_once():
        params, model_state = jax.jit(fns.init)(jax.random.key(3), IMAGES)
    save_node(path, params, model_state, model="dropping", num_classes=10, image_shape=(8, 8, 1))
    loaded, loaded_params, loaded_state = load_node(path)
    chex.assert_trees_all_equal((loaded_params, loaded_state), (params, model_state))
    expected, _ = fns.apply(params, model_state, IMAGES, True)
    logits, _ = loaded.apply(loaded_params, loaded_state, IMAGES, True)
    np.testing.assert_array_equal(logits, expected)


def test_a_node_whose_model_is_not_registered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.safetensors"
    save_node(path, *TINY_WEIGHTS, model="unheard_of", num_classes=10, image_shape=(8, 8, 1))
    with refused("model") as error:
        load_node(path)
    assert "unheard_of" in str(error.value)


@pytest.mark.parametrize("name", ["node.npz", "node", "missing/node.safetensors"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with refused("export") as error:
        save_node(path, *TINY_WEIGHTS, model="tiny", num_classes=10, image_shape=(8, 8, 1))
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_is_whole_or_not_there(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = exported.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with refused("export"):
        save_node(exported, *TINY_WEIGHTS, model="tiny", num_classes=10, image_shape=(8, 8, 1))
    assert exported.read_bytes() == former
    assert list(exported.parent.iterdir()) == [exported]
