"""`jax_enable_x64`: what is float32 stays float32, and float64 is computed as such."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native import require_onednn
from random_variables import random_variables
from runs import assert_same_end, in_process, metrics, train
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import evaluate
from ktg_jax.cpu import operations
from ktg_jax.cpu.convolution import conv2d, formulation
from ktg_jax.models.layers import BatchNormRelu
from ktg_jax.training.batches import Arrays, Batches, plan_batch, take_batch
from ktg_jax.training.evaluation import make_evaluator
from ktg_jax.training.fused_engine import fused_step
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.placement import place
from ktg_jax.training.task import Task

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 1), np.uint8)
LABELS = np.arange(12, dtype=np.int32) % 5


@pytest.fixture(autouse=True)
def _wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def with_narrow(compute: Any) -> tuple[Any, Any]:
    """What a function returns here, and without `jax_enable_x64`."""
    wide = compute()
    with jax.enable_x64(False):
        return wide, compute()


# --- convolutions and batch normalisation


def with_gradients(images: Any, kernel: Any, stride: int) -> Any:
    @jax.jit
    def compute(images: jax.Array, kernel: jax.Array) -> Any:
        y, pullback = jax.vjp(lambda x, k: conv2d(x, k, stride, 1), images, kernel)
        return y, *pullback(jnp.cos(y))

    return compute(images, kernel)


@pytest.mark.parametrize("name", ["onednn", "chunked", "xla"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_both_widths(name: str, stride: int) -> None:
    if name == "onednn":
        require_onednn()
    images, kernel = RNG.standard_normal((3, 6, 6, 16)), RNG.standard_normal((3, 3, 16, 16))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum("bijchw,hwco->bijo", windows[:, ::stride, ::stride], kernel)
    with formulation(name):
        exact = with_gradients(images, kernel, stride)
        single = with_gradients(images.astype(np.float32), kernel.astype(np.float32), stride)
    assert [x.dtype for x in exact] == [np.float64] * 3
    assert [x.dtype for x in single] == [np.float32] * 3
    np.testing.assert_allclose(exact[0], expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(single, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_native_operations_refuse_what_they_would_misread() -> None:
    require_onednn()
    with pytest.raises(AssertionError):
        operations.moments(jnp.ones((4, 16)))
    with pytest.raises(AssertionError):
        operations.convolution(jnp.ones((1, 4, 4, 16)), jnp.ones((3, 3, 16, 16)), 1, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_batch_normalisation_keeps_float32_statistics(dtype: Any) -> None:
    module, x = BatchNormRelu(dtype), jnp.asarray(RNG.standard_normal((6, 16)), dtype)
    variables = module.init(jax.random.key(0), x, True)
    y, new = module.apply(variables, x, True, mutable=["batch_stats"])
    chex.assert_type([y, module.apply(variables, x, False)], dtype)
    chex.assert_type(jax.tree.leaves((variables, new)), jnp.float32)
    exact = np.asarray(x, np.float64)
    normal = np.maximum((exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), 0)
    np.testing.assert_allclose(y, normal, atol=1e-12 if dtype == jnp.float64 else 1e-6)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * exact.mean(0), atol=1e-6)


# --- losses


@pytest.mark.slow
def test_float64_logits_have_float32_losses_and_float64_gradients() -> None:
    logits = jnp.asarray(RNG.standard_normal((2, 5, 3)))
    labels, gates = np.arange(5) % 3, np.array([[0, 2], [3, 4]])
    args = (labels, gates, np.float64(0.5), np.float64(2.0))
    losses = ktg.edge_losses(logits, *args)
    gradient = jax.grad(ktg.graph_loss)(logits, *args)
    assert (losses.dtype, gradient.dtype) == (jnp.float32, jnp.float64)
    with jax.enable_x64(False):
        expected = ktg.edge_losses(np.asarray(logits, np.float32), labels, gates, 0.5, 2.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    _, metrics = ktg.graph_gradients(list(logits), *args)
    chex.assert_type(list(metrics.values()), jnp.float32)


# --- training


@pytest.mark.slow
def test_batches_are_the_same() -> None:
    def batch() -> Any:
        sizes: dict[str, Any] = {"num_images": 12, "batch_size": 5, "max_offset": 2, "flip": True}
        plan = plan_batch(jax.random.key(3), 4, **sizes)
        return plan, *take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)

    wide, narrow = with_narrow(batch)
    chex.assert_trees_all_equal_dtypes(wide, narrow)
    chex.assert_trees_all_equal(wide, narrow)
    assert wide[0].flip.any()
    assert wide[0].offset.any()


@pytest.mark.parametrize("model", ["cnn", "resnet8", "wrn10_2"])
def test_networks_have_the_same_variables(model: str) -> None:
    def shapes() -> Any:
        fns = ktg.build_model(model, 5)
        return jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))

    wide, narrow = with_narrow(shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(wide, narrow)


GRAPH = ktg.Graph(
    tuple(ktg.Node("cnn", name, "elsewhere" if name == "c" else None) for name in "abc"),
    (
        ("through", "correct", "linear"),
        ("negative_linear", "cutoff", "through"),
        ("cutoff", "cutoff", "cutoff"),
    ),
    temperature=2.0,
).carrying({"kl": 1.0, "attention": 10.0, "features": 0.1})
OPTIMIZER = ktg.sgd(ktg.step_schedule(0.1, 10, warmup_steps=3))


def two_steps(engine: str) -> Any:
    """The state after two steps of a graph of small networks, their metrics and an evaluation."""
    node_fns, parallel = [ktg.build_model("cnn", 5)] * 3, ktg.Parallel("jit", jax.devices()[:1])
    images = jnp.zeros((1, 8, 8, 1), jnp.float32)
    state = ktg.init_state(GRAPH, node_fns, OPTIMIZER, jax.random.key(0), images)
    node_variables = [random_variables(node_fns[0], images, seed) for seed in range(3)]
    params, model_state = zip(*node_variables, strict=True)
    state = state.replace(params=params, model_state=model_state)  # type: ignore[attr-defined]
    data, seen = Arrays(jnp.asarray(IMAGES), jnp.asarray(LABELS)), []
    how: dict[str, Any] = {"node_fns": node_fns, "optimizer": OPTIMIZER}
    if engine == "fused":
        task = Task(batches=Batches(12, 12), image_shape=(8, 8, 1), total_steps=10, **how)
        step = fused_step(task, parallel)
        for _ in range(2):
            state, metrics = step(state, data, GRAPH.edge_arrays, jax.random.key(1))
            seen.append(metrics)
    else:
        device = parallel.devices[0]
        state = place(state, (device,) * 3)
        for k in (1, 2):
            state, metrics = per_node_step(
                state,
                {device: jnp.asarray(IMAGES, jnp.float32) / 255},
                data.labels,
                GRAPH.edge_arrays,
                k / 10,
                placement=(device,) * 3,
                **how,
            )
            seen.append(metrics)
    sums = make_evaluator(node_fns, parallel, batch_size=8)(state, data)
    return jax.device_get((state, seen, sums))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "per_node"])
@pytest.mark.parametrize("name", ["onednn", "xla"])
def test_a_graph_trains_the_same(engine: str, name: str) -> None:
    if name == "onednn":
        require_onednn()
    with formulation(name):
        wide, narrow = with_narrow(lambda: two_steps(engine))
    chex.assert_trees_all_equal_dtypes(wide, narrow)
    chex.assert_trees_all_close(wide, narrow, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_and_is_evaluated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"models": ("tiny", "dropping"), "epochs": 2}
    train(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped" / "result.json").unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "2")
    assert "Resuming after epoch 1 of 2" in train(tmp_path / "stopped", **options)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    ended = in_process(evaluate.main, tmp_path / "whole")
    assert (ended.code, ended.err) == (0, "")
    with jax.enable_x64(False):
        assert in_process(evaluate.main, tmp_path / "whole").out == ended.out


@pytest.mark.slow
def test_a_run_is_the_same_as_any(tmp_path: Path) -> None:
    options: dict[str, Any] = {"models": ("tiny", "tiny"), "epochs": 1}
    train(tmp_path / "wide", **options)
    with jax.enable_x64(False):
        train(tmp_path / "narrow", **options)
    (wide,), (narrow,) = metrics(tmp_path / "wide"), metrics(tmp_path / "narrow")
    for ours, theirs in zip(wide["nodes"], narrow["nodes"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)


def test_a_network_in_float64_computes_in_it() -> None:
    fns = ktg.from_linen(Tiny(5, dtype=jnp.float64))
    images = jnp.asarray(IMAGES / 255)
    variables = random_variables(fns, images, seed=0)
    logits, model_state = fns.apply(*variables, images, True)
    assert logits.dtype == jnp.float64
    chex.assert_trees_all_equal_dtypes(model_state, variables[1])
