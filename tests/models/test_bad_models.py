"""Other people's models and modules: what does not fit is found before anything is computed."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import odd_models
import optax
import pytest
from runs import Ended, in_process

import ktg_jax as ktg
from experiments import train as train_module
from experiments.ablation import command as ablation
from experiments.represent import command as represent
from experiments.search import command as search
from ktg_jax import InputError
from ktg_jax.models import check_network
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_evaluation import per_node_eval
from ktg_jax.training.placement import place

KEY = jax.random.key(0)
ON = "on images [4, 8, 8, 1]"
TRAINED = f"a network that can be trained {ON}"
INITIALISED = "a network that can be initialised on images [1, 8, 8, 1]"

REFUSED: dict[str, tuple[str, str]] = {
    "pair": (TRAINED, "logits: got (float32[4, 10], float32[4, 8, 8, 1]); allowed: float[4, 10]"),
    "named": (TRAINED, "logits: got {'logits': float32[4, 10]}; allowed: float[4, 10]"),
    "map": (TRAINED, "logits: got float32[4, 8, 8, 10]; allowed: float[4, 10]"),
    "integers": (TRAINED, "logits: got int32[4, 10]; allowed: float[4, 10]"),
    "transposed": (TRAINED, "logits: got float32[10, 4]; allowed: float[4, 10]"),
    "seven": (TRAINED, "logits: got float32[4, 7]; allowed: float[4, 10]"),
    "nothing": (TRAINED, "logits: got None; allowed: float[4, 10]"),
    "large": (INITIALISED, "cannot reshape array of shape (1, 8, 8, 1)"),
    "unnamed": (INITIALISED, "mode of Unnamed: got 'batch_stats that training leaves as they are'"),
    "text-params": (INITIALISED, "what init returns: got 'zero'; allowed: arrays alone"),
    "int-params": (INITIALISED, "params bias: got int32[1]; allowed: floats"),
    "params-alone": (INITIALISED, "what init returns: got {'bias': 0.5}; allowed: a pair"),
    "stateless": (TRAINED, "what apply returns: got float32[4, 10]; allowed: a pair"),
    "growing": (TRAINED, "model state more: got 1; allowed: None, as before"),
    "other-dtype": (TRAINED, "model state n: got float32[]; allowed: int32[], as before"),
}
UNMADE: dict[str, str] = {
    "raising": "one that can be made for 10 classes (OSError: no licence)",
    "none": "one whose factory returns a flax.linen module, or NodeFns",
    "class": "it returns a class, Linear",
    "finished-nnx": "it returns LinearNNX",
}


def check(model: str, **changes: Any) -> None:
    fixed: dict[str, Any] = {"num_classes": 10, "image_shape": (8, 8, 1), "batch_size": 4}
    check_network(ktg.build_model(model, 10), model, **fixed | changes)


@pytest.mark.parametrize(("model", "found"), REFUSED.items(), ids=REFUSED.keys())
def test_a_network_that_does_not_fit_is_refused(model: str, found: tuple[str, str]) -> None:
    with pytest.raises(InputError) as refused:
        check(model)
    assert str(refused.value).startswith(f"model: got '{model}'; allowed: {found[0]} (")
    assert found[1] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("model", "found"), UNMADE.items(), ids=UNMADE.keys())
def test_a_factory_that_makes_no_network_is_refused(model: str, found: str) -> None:
    with pytest.raises(InputError) as refused:
        ktg.build_model(model, 10)
    assert str(refused.value).startswith(f"model: got '{model}'; allowed: one ")
    assert found in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["numbers", "said", "cnn", "resnet8"])
def test_a_network_that_fits_is_accepted(model: str) -> None:
    check(model)


def test_a_network_is_checked_as_it_is_used() -> None:
    """Evaluation has batches of its own, and a mapped axis is there in training alone."""
    with pytest.raises(InputError, match=r"evaluated on images \[6, 8, 8, 1\] .*pairs of eight"):
        check_network(
            ktg.NodeFns(
                init=lambda rng, images: ({}, {}),
                apply=lambda params, state, images, train: (_of_eight(images), state),
            ),
            "eights",
            num_classes=10,
            image_shape=(8, 8, 1),
            batch_size=8,
            evaluation_size=6,
        )
    fixed: dict[str, Any] = {"num_classes": 10, "image_shape": (8, 8, 1), "batch_size": 4}
    check_network(ktg.build_model("cnn", 10, axis_name="data"), "cnn", axis=("data", 2), **fixed)
    with pytest.raises(InputError, match=r"NameError: .*unbound axis name"):
        check_network(ktg.build_model("cnn", 10, axis_name="data"), "cnn", **fixed)


def _of_eight(images: jax.Array) -> jax.Array:
    if len(images) != 8:
        raise ValueError("pairs of eight")
    return jnp.zeros((8, 10))


def test_a_mode_for_node_functions_is_refused() -> None:
    ktg.register_model("said-twice", odd_models.FACTORIES["numbers"], mode="phase")
    with pytest.raises(InputError, match="model: got 'said-twice'; allowed: a linen module where"):
        ktg.build_model("said-twice", 10)


def test_a_factory_that_has_no_hash_is_a_factory() -> None:
    class Factory(list):
        def __call__(self, num_classes: int) -> ktg.NodeFns:
            return ktg.from_linen(odd_models.Linear(num_classes))

    ktg.register_model("unhashable", Factory())
    assert ktg.build_model("unhashable", 10) is ktg.build_model("unhashable", 10)


# --- in the functions

GRAPH = ktg.graphs.mutual(["cnn", "odd"])
IMAGES, LABELS = jnp.ones((4, 8, 8, 1)), jnp.arange(4)
DEVICE = jax.local_devices()[0]


def started(model: str) -> tuple[list[ktg.NodeFns], ktg.GraphState]:
    node_fns = [ktg.build_model("said", 10), ktg.build_model(model, 10)]
    return node_fns, ktg.init_state(GRAPH, node_fns, optax.sgd(0.1), KEY, IMAGES)


def fused_step(node_fns: list[ktg.NodeFns], state: ktg.GraphState) -> Any:
    fixed: dict[str, Any] = {"node_fns": node_fns, "optimizer": optax.sgd(0.1)}
    return ktg.train_step(state, IMAGES, LABELS, GRAPH.gate_codes, 1.0, **fixed)


def node_by_node(node_fns: list[ktg.NodeFns], state: ktg.GraphState) -> Any:
    fixed: dict[str, Any] = {"node_fns": node_fns, "optimizer": optax.sgd(0.1)}
    fixed["placement"] = (DEVICE, DEVICE)
    state = place(state, fixed["placement"])
    return per_node_step(state, {DEVICE: IMAGES}, LABELS, GRAPH.gate_codes, 1.0, **fixed)


def evaluation(node_fns: list[ktg.NodeFns], state: ktg.GraphState) -> Any:
    return ktg.eval_step(state, IMAGES, LABELS, node_fns=node_fns)


def evaluation_node_by_node(node_fns: list[ktg.NodeFns], state: ktg.GraphState) -> Any:
    fixed: dict[str, Any] = {"node_fns": node_fns, "placement": (DEVICE, DEVICE)}
    return per_node_eval(state, {DEVICE: IMAGES}, LABELS, **fixed)


FUNCTIONS = [fused_step, node_by_node, evaluation, evaluation_node_by_node]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("pair", r"logits: got \(float32\[4, 10\], float32\[4, 8, 8, 1\]\); allowed: float\[4, cl"),
        ("map", r"logits: got float32\[4, 8, 8, 10\]; allowed: float\[4, classes\]"),
        ("integers", r"logits: got int32\[4, 10\]; allowed: float\[4, classes\]"),
        ("stateless", r"what apply returns: got float32\[4, 10\]; allowed: a pair of "),
    ],
)
def test_a_step_says_which_node_puts_out_what(function: Any, model: str, found: str) -> None:
    with pytest.raises(InputError, match=rf"^{found}.* \(node 1\)$"):
        function(*started(model))


@pytest.mark.parametrize("function", FUNCTIONS[:2])
def test_nodes_with_other_numbers_of_classes_are_refused(function: Any) -> None:
    said = r"got \[\(4, 10\), \(4, 7\)\]; allowed: one|got 7; allowed: 10, .*connector"
    with pytest.raises(InputError, match=said):
        function(*started("seven"))


def test_params_that_are_no_arrays_are_refused_and_numbers_are_arrays() -> None:
    with pytest.raises(InputError, match=r"what init returns: got 'zero'; .* \(node odd-1\)"):
        started("text-params")
    _, state = started("numbers")
    assert state.params[1]["bias"].dtype == np.float32
    assert state.model_state[1]["n"].dtype == np.int32


# --- in the commands

SMALL = [
    *("--imports", "odd_models", "--train-limit", "200"),
    *("--epochs", "1", "--batch-size", "4"),
]


def assert_refused(ended: Ended, text: str) -> None:
    assert ended.code == 2, ended
    assert re.fullmatch(r"error: .*: got .*; allowed: .*\n", ended.err), ended
    assert text in ended.err


@pytest.mark.parametrize("model", [*REFUSED, *UNMADE])
def test_training_refuses_it_and_leaves_nothing(model: str, tmp_path: Path) -> None:
    workdir = "--workdir", tmp_path / "run"
    ended = in_process(train_module.main, "--models", "cnn", model, *SMALL, *workdir)
    assert_refused(ended, f"error: nodes[1].model: got '{model}'; allowed: ")
    assert_refused(ended, REFUSED[model][1] if model in REFUSED else UNMADE[model])
    assert ended.err.endswith(f" (node {model}-1)\n")
    assert list(tmp_path.iterdir()) == []


def test_it_is_refused_before_a_frozen_node_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    models = ["--graph", "distillation", "--models", "pair", "said", "--weights", "none"]
    ended = in_process(
        train_module.main, *models, "pretrained", *SMALL, "--workdir", tmp_path / "run"
    )
    assert_refused(ended, "logits: got (float32[4, 10]")
    assert not list((tmp_path / "cache").glob("pretrained/*"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert list(tmp_path.iterdir()) == []


def test_under_pmap_the_shape_is_that_of_a_device(tmp_path: Path) -> None:
    workdir = "--workdir", tmp_path / "run"
    ended = in_process(
        train_module.main, "--models", "pair", *SMALL, "--parallel", "pmap", *workdir
    )
    assert_refused(ended, "trained on images [2, 8, 8, 1] (logits: got (float32[2, 10]")


@pytest.mark.parametrize(
    ("main", "options", "field"),
    [
        (
            search.main,
            "--target cnn --candidates cnn map --trials 90",
            "candidates[1]",
        ),
        (search.main, "--target pair --trials 90", "target"),
        (search.main, "--candidates raising cnn --trials 90", "candidates[0]"),
        (represent.main, "--student integers", "student"),
        (represent.main, "--teacher-model seven", "teacher_model"),
        (ablation.main, "--students cnn named", "students[1]"),
    ],
)
def test_the_other_commands_refuse_it_before_they_begin(
    main: Any, options: str, field: str, tmp_path: Path
) -> None:
    ended = in_process(main, *options.split(), *SMALL, "--workdir", tmp_path / "out")
    assert_refused(ended, f"error: {field}: got ")
    assert list(tmp_path.iterdir()) == []


# --- modules

MODULES = {
    "syntax": ("def model(:\n", "SyntaxError: invalid syntax (ktg_syntax.py, line 1)"),
    "raising": ("raise RuntimeError('no\\nlicence')\n", "RuntimeError: no)"),
    "exiting": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "taken": (
        "import ktg_jax\nktg_jax.register_model('cnn', lambda n: n)\n",
        "(name: got 'cnn'; allowed: a name that no built-in model has)",
    ),
    "chain": ("import ktg_syntax\n", "SyntaxError: invalid syntax (ktg_syntax.py, line 1)"),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("main", [train_module.main, search.main], ids=["train", "search"])
def test_a_module_that_cannot_be_imported_is_refused(
    name: str, main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    for each, (text, _) in MODULES.items():
        (folder / f"ktg_{each}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    ended = in_process(main, "--imports", f"ktg_{name}", "--workdir", tmp_path / "run")
    assert_refused(ended, f"error: imports: got 'ktg_{name}'; allowed: a module that can be impor")
    assert_refused(ended, MODULES[name][1])
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]
