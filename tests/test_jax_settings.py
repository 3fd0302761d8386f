"""JAX's own settings, which users change: debugging NaN and infinities, and platforms.

Implicit promotion of ranks and dtypes is barred in all tests (`conftest.py`); `jax_enable_x64` has
a file of its own.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carried import carrying, outputs, stage_edge_losses
from runs import end_of, finished, in_process, metrics, start
from tiny_models import Staged

import ktg_jax as ktg
from experiments import evaluate, record
from experiments import train as train_module
from experiments.ablation import command as ablation
from experiments.represent import command as represent
from experiments.search import command as search
from ktg_jax.gates import gate_weights
from ktg_jax.priors import NodePrior, stage_kernels
from ktg_jax.training.evaluation import eval_sums
from ktg_jax.training.node_terms import distance_metrics

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((5, 4, 3)), jnp.float32)
STAGES = [[jnp.asarray(RNG.standard_normal((4, 2, 2, 3)), jnp.float32)] for _ in range(5)]
LABELS = np.array([0, 1, 2, 0], np.int32)
GATES = np.array([np.roll(np.arange(5), shift) for shift in range(5)], np.int32)  # all, everywhere
BAD_GATES = np.where(np.eye(5, k=1, dtype=bool), 7, GATES)


@contextmanager
def debugging() -> Iterator[None]:
    """Whatever makes a NaN or an infinity stops there."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


EVERYTHING = {
    "cross_entropy": 1.0,
    "kl": 0.5,
    "reverse_kl": 1.0,
    "attention": 10.0,
    "features": 1.0,
}
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "gate_weights": lambda gates, labels: gate_weights(gates, 0.5, jnp.ones((5, 4), bool)),
    "edge_losses": lambda gates, labels: ktg.edge_losses(LOGITS, labels, gates, 0.5, 2.0),
    "node_losses": lambda gates, labels: ktg.node_losses(LOGITS, labels, gates, 0.5),
    "graph_loss": lambda gates, labels: jax.grad(ktg.graph_loss)(LOGITS, labels, gates, 0.5),
    "graph_gradients": lambda gates, labels: ktg.graph_gradients(
        outputs(LOGITS, STAGES), labels, carrying(gates, EVERYTHING), 0.5
    ),
    "stage_edge_losses": lambda gates, labels: stage_edge_losses(
        STAGES, list(LOGITS), labels, 0.5, carrying(gates, {"attention": 10.0, "features": 1.0})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_nan_is_made_on_the_way(name: str) -> None:
    with debugging():
        chex.assert_tree_all_finite(FUNCTIONS[name](GATES, LABELS))
        with pytest.raises(FloatingPointError):  # where one is to be seen, it is
            FUNCTIONS[name](BAD_GATES, LABELS)


def test_a_label_that_is_no_class_stops_only_where_it_counts() -> None:
    padded, counted = np.array([0, 1, 2, -1]), np.array([True, True, True, False])
    with debugging():
        sums = eval_sums(list(LOGITS), padded, counted)
        chex.assert_tree_all_finite(sums)
        assert sums["count"] == 3
        with pytest.raises(FloatingPointError):
            eval_sums(list(LOGITS), padded)
        with pytest.raises(FloatingPointError):
            ktg.cross_entropy(LOGITS[0], padded)


@pytest.mark.slow
def test_a_whole_step_makes_none() -> None:
    graph, optimizer = ktg.graphs.mutual(["staged", "staged"]), ktg.sgd(0.1)
    node_fns = [ktg.from_linen(Staged(3))] * 2
    images = jnp.asarray(RNG.random((4, 8, 8, 1)), jnp.float32)
    state = ktg.init_state(graph, node_fns, optimizer, jax.random.key(0), images)
    kernels = stage_kernels(state.params[0])
    ones = tuple(jnp.ones(shape, jnp.float32) for shape in kernels.values())
    priors = [NodePrior(ktg.Prior(ones, tuple(kernels))), None]
    fixed: dict[str, Any] = {"node_fns": node_fns, "optimizer": optimizer}

    def step(state: Any) -> Any:
        return ktg.train_step(
            state, images, jnp.asarray(LABELS), graph.gate_codes, 0.5, priors=priors, **fixed
        )

    with debugging():
        new_state, found = jax.jit(step)(state)
        distances = found.pop("prior_distance")
        chex.assert_tree_all_finite((new_state.params, found))
    assert (distances[0] > 0).all()
    assert distances[1].tolist() == [-1, -1]  # there is no prior, and NaN may not say so
    assert np.isnan(distance_metrics([None, jnp.ones(1, jnp.float32)])["prior_distance"][0]).all()


# --- whole commands

STRICT = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
}


@pytest.mark.slow
def test_the_default_training_runs_under_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--epochs", "1", "--train-limit", "200", "--workdir"]
    processes = [start("experiments.train", *command, "default", cwd=tmp_path)]
    for name, value in STRICT.items():
        monkeypatch.setenv(name, value)
    processes.append(start("experiments.train", *command, "strict", cwd=tmp_path))
    for process in processes:
        ended = end_of(process)
        assert (ended.code, ended.err) == (0, ""), ended.err[-500:]
    (strict,), (default,) = (metrics(tmp_path / name) for name in ("strict", "default"))
    for ours, theirs in zip(strict["nodes"], default["nodes"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    ended = end_of(start("experiments.evaluate", "strict", cwd=tmp_path))
    assert (ended.code, ended.err) == (0, "")


# --- platforms

MAINS = {
    "train": train_module.main,
    "evaluate": evaluate.main,
    "record": record.main,
    "search": search.main,
    "represent": represent.main,
    "ablation": ablation.main,
}
LINE = r"error: JAX_PLATFORMS: got .*; allowed: a platform that JAX finds here.*\(%s\)\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which can be evaluated."""
    return finished(tmp_path_factory, "settings", epochs=1)


# JAX merely asserts that there is a device where it is told to use CUDA alone.
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to\n start")], ids=repr)
@pytest.mark.parametrize("name", MAINS)
def test_a_platform_that_is_not_there_is_refused_and_nothing_is_left(
    name: str, error: Exception, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", devices)
    arguments: dict[str, list[str | Path]] = {
        "evaluate": [run],
        "record": [run, "--out", "recorded"],
    }
    ended = in_process(MAINS[name], *arguments.get(name, []))
    assert (ended.code, ended.out) == (2, "")
    reason = "Unable to start" if error.args else "no device found"
    assert re.fullmatch(LINE % reason, ended.err), ended.err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_platform_that_does_not_exist_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    ended = end_of(start("experiments.train", cwd=tmp_path))
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(LINE % ".*'abacus' is not in the list.*", ended.err), ended.err
    assert "got 'abacus'" in ended.err
    assert os.listdir(tmp_path) == []
