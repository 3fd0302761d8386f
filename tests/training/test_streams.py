"""Random numbers that nodes draw in training: other ones each time, and the same ones again."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from runs import assert_same_end, compiled_once, in_process, saved_state, train
from safetensors.numpy import load_file
from tiny_models import Regularised

import ktg_jax as ktg
from experiments import evaluate
from ktg_jax import NodeFns, from_linen, from_nnx
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.task import Engine, Task
from ktg_jax.training.warm_start import load_weights, with_weights

KEY = jax.random.key(0)
IMAGES = jnp.ones((6, 8, 8, 1))
SGD = ktg.sgd(0.1)


class Mask(nn.Module):
    """Its logits are a mask of dropout, 0 or 2, times a parameter that begins as 1."""

    num_classes: int = 40
    rate: float = 0.5

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.num_classes,))
        ones = jnp.ones((len(images), self.num_classes))
        return nn.Dropout(self.rate)(ones, deterministic=not train) * scale


class Noisy(nn.Module):
    """Two streams: one of another name, and dropout's, asked for only if it is there."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        logits = nn.Dense(5)(images.reshape(len(images), -1))
        if train:
            logits += jax.random.normal(self.make_rng("noise"), logits.shape)
            if self.has_rng("dropout"):
                logits += jax.random.normal(self.make_rng("dropout"), logits.shape)
        return logits


class Lifted(nn.Module):
    """Batch statistics, and perhaps dropout, within a transformation; and fixed noise."""

    rate: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images + jax.random.normal(jax.random.key(0), images.shape)
        return nn.remat(Layers, static_argnums=(2,))(self.rate)(x.reshape(len(x), -1), train)


class Layers(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dropout(self.rate, deterministic=not train)(x)


class Guarded(nn.Module):
    """Draws only where it has a stream of its own name."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        logits = nn.Dense(5)(images.reshape(len(images), -1))
        if train and self.has_rng("drop_path"):
            logits *= jax.random.bernoulli(self.make_rng("drop_path"), 0.5, (len(images), 1))
        return logits


MASK = from_linen(Mask())


def masks(fns: NodeFns, key: jax.Array = KEY, passes: int = 2) -> list[np.ndarray]:
    """The logits of so many training passes, each after the other."""
    params, state = fns.init(key, IMAGES)
    made = []
    for _ in range(passes):
        logits, state = fns.apply(params, state, IMAGES, True)
        made.append(np.asarray(logits))
    return made


def differ(a: Any, b: Any) -> bool:
    return bool(np.any(np.asarray(a) != np.asarray(b)))


def collections_of(fns: NodeFns) -> set[str]:
    """The parts of a model state."""
    return set(jax.eval_shape(fns.init, KEY, IMAGES)[1])


def test_dropout_draws_anew_in_each_pass_and_the_same_again() -> None:
    first, second = masks(MASK)
    assert set(np.unique(first)) == set(np.unique(second)) == {0.0, 2.0}
    assert 0.35 < np.mean(first != second) < 0.65
    np.testing.assert_array_equal([first, second], masks(MASK))
    assert differ(first, masks(MASK, jax.random.key(1))[0])


def test_evaluation_draws_nothing_and_changes_nothing() -> None:
    params, state = MASK.init(KEY, IMAGES)
    logits, still = MASK.apply(params, state, IMAGES, False)
    np.testing.assert_array_equal(logits, np.ones((6, 40)))
    assert still is state


def test_a_stream_is_in_the_state_of_those_alone_that_draw() -> None:
    for fns in (
        from_linen(Mask(rate=0.0)),
        from_linen(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(5)])),
        ktg.build_model("tiny", 5),
    ):
        assert "random_stream" not in collections_of(fns)
    assert collections_of(from_linen(Lifted(rate=0.0))) == {"batch_stats"}
    assert collections_of(from_linen(Lifted(rate=0.1))) == {"batch_stats", "random_stream"}
    assert collections_of(ktg.build_model("cnn", 5)) == {"batch_stats"}
    assert collections_of(ktg.build_model("regularised", 5)) == {"batch_stats", "random_stream"}


@pytest.mark.slow
def test_weights_are_those_that_they_would_be_without_a_stream() -> None:
    params, _ = from_linen(Regularised(5)).init(KEY, IMAGES)
    expected = Regularised(5).init(KEY, IMAGES)["params"]
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_streams_of_other_names_are_given_too() -> None:
    plain = Noisy().apply({"params": from_linen(Noisy()).init(KEY, IMAGES)[0]}, IMAGES, False)
    noise = [logits - plain for logits in masks(from_linen(Noisy()))]
    assert differ(*noise)
    with_dropout = masks(from_linen(Noisy()))[0] - plain
    without = masks(from_linen(Noisy(), rngs=("noise",)))[0] - plain
    assert np.std(with_dropout) > 1.1 * np.std(without) > 0


def test_a_stream_that_a_module_asks_for_only_if_it_is_there_can_be_named() -> None:
    assert collections_of(from_linen(Guarded())) == set()
    first, second = masks(from_linen(Guarded(), rngs=("drop_path",)))
    assert differ(first, second)


def test_a_key_of_the_old_kind_is_as_good() -> None:
    first, second = masks(MASK, jax.random.PRNGKey(0))
    assert differ(first, second)
    np.testing.assert_array_equal(first, masks(MASK)[0])


def state_of(node_fns: list[NodeFns], graph: ktg.Graph) -> ktg.GraphState:
    return ktg.init_state(graph, node_fns, SGD, KEY, IMAGES[:1])


def test_nodes_draw_apart_and_by_their_names() -> None:
    graph = ktg.graphs.mutual([ktg.Node("mask", name) for name in ("a", "b", "c")])
    state = state_of([MASK] * 3, graph)
    a, b, c = (
        MASK.apply(params, model_state, IMAGES, True)[0]
        for params, model_state in zip(state.params, state.model_state, strict=True)
    )
    assert differ(a, b)
    assert differ(b, c)
    alone = state_of([MASK], ktg.graphs.independent([ktg.Node("mask", "b")]))
    chex.assert_trees_all_equal(alone.model_state[0], state.model_state[1])


@pytest.mark.slow
def test_a_frozen_node_draws_nothing() -> None:
    graph = ktg.graphs.distillation(ktg.Node("mask", "student"), ktg.Node("mask", "teacher"))
    before = state_of([MASK] * 2, graph)
    labels = jnp.arange(6)
    step = jax.jit(partial(ktg.train_step, node_fns=[MASK] * 2, optimizer=SGD))
    state, metrics = step(before, IMAGES, labels, graph.gate_codes, 1.0)
    chex.assert_trees_all_equal(state.model_state[1], before.model_state[1])
    assert int(state.model_state[0]["random_stream"]["count"]) == 1
    student, _ = MASK.apply(before.params[0], before.model_state[0], IMAGES, True)
    expected = ktg.edge_losses([student, jnp.ones((6, 40))], labels, graph.gate_codes, 1.0)
    np.testing.assert_allclose(metrics["edge_losses"], expected, rtol=1e-5)


def trained(engine_name: str, steps_per_call: int = 1) -> ktg.GraphState:
    """Four steps by an engine."""
    graph = ktg.graphs.mutual([ktg.Node("regularised", name) for name in "ab"])
    node_fns = [ktg.build_model("regularised", 10)] * 2
    state = ktg.init_state(graph, node_fns, SGD, KEY, jnp.zeros((1, 8, 8, 1)))
    rng = np.random.default_rng(0)
    data = Arrays(rng.integers(256, size=(32, 8, 8, 1), dtype=np.uint8), rng.integers(10, size=32))
    parallel = ktg.Parallel(devices=jax.local_devices()[:1])
    task = Task(node_fns, SGD, Batches(32, 8), (8, 8, 1), total_steps=4)
    engine: Engine = FusedEngine(task, parallel)
    if engine_name == "per_node":
        engine = PerNodeEngine(task, state, parallel.devices)
    step = engine.make_step(engine.load(data), graph.gate_codes, KEY)
    state = engine.place(state)
    for _ in range(4 // steps_per_call):
        state, _ = step(state, steps_per_call)
    return jax.device_get(state)


@pytest.mark.slow
def test_both_engines_draw_the_same() -> None:
    with compiled_once():
        fused, per_node = trained("fused"), trained("per_node")
        several = trained("fused", steps_per_call=2)
    assert int(fused.model_state[0]["random_stream"]["count"]) == 4
    for other in (per_node, several):
        chex.assert_trees_all_close(other.params, fused.params, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(other.model_state, fused.model_state, strict=True):
            chex.assert_trees_all_equal(mine["random_stream"], theirs["random_stream"])


# --- devices


class Shared(nn.Module):
    """Keeps the masks of all devices."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        seen = self.variable("seen", "masks", jnp.zeros, (2, 3, 40))
        logits = Mask(name="mask")(images, train)
        if train:
            seen.value = jax.lax.all_gather(logits, "data")
        return logits


class SharedNNX(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(40))
        self.masks = nnx.BatchStat(jnp.zeros((2, 3, 40)))

    def __call__(self, images: jax.Array) -> jax.Array:
        logits = self.dropout(jnp.ones((len(images), 40))) * self.scale
        if not self.dropout.deterministic:
            self.masks[...] = jax.lax.all_gather(logits, "data")
        return logits


@pytest.mark.parametrize(
    "fns",
    [from_linen(Shared(), rngs=("dropout",)), from_nnx(SharedNNX)],
    ids=["linen", "nnx"],
)
def test_devices_draw_apart_under_pmap(fns: NodeFns) -> None:
    parallel = ktg.Parallel("pmap", jax.local_devices()[:2])
    graph = ktg.graphs.independent([ktg.Node("shared", "a")])
    state = state_of([fns], graph)

    def step(state: ktg.GraphState, images: jax.Array) -> Any:
        fixed: dict[str, Any] = {"node_fns": [fns], "optimizer": SGD, "axis_name": "data"}
        labels = jnp.zeros(3, jnp.int32)
        return ktg.train_step(
            state, parallel.shard(images), labels, jnp.zeros((1, 1), int), 1.0, **fixed
        )

    compiled, seen, keys = parallel.compile(step), [], []
    state = parallel.replicate(state)
    for _ in range(2):
        state, _ = compiled(state, IMAGES)
        leaves = jax.tree.leaves(state.model_state[0])
        seen += [np.asarray(leaf) for leaf in leaves if leaf.shape == (2, 3, 40)]
        keys += [np.array(jax.random.key_data(x)) for x in leaves if x.dtype == KEY.dtype]
    (first, other), (second, _) = seen
    assert differ(first != 0, other != 0)
    assert differ(first != 0, second != 0)
    assert not differ(*keys)  # the same on all devices: it is what checkpoints keep


@pytest.mark.slow
def test_a_model_that_is_built_for_an_axis_draws_apart_by_itself() -> None:
    fns = ktg.build_model("regularised", 40, axis_name="shards")
    params, state = jax.jit(fns.init)(KEY, IMAGES)
    images = jnp.broadcast_to(jax.random.uniform(KEY, (4, 8, 8, 1)), (2, 4, 8, 8, 1))
    forward = jax.vmap(lambda x: fns.apply(params, state, x, True), axis_name="shards")
    logits, _ = jax.jit(forward)(images)
    assert differ(logits[0], logits[1])


# --- runs and files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("streams") / "run"
    train(workdir, models=("regularised", "regularised"))
    return workdir


def test_a_resumed_run_draws_what_it_would_have_drawn(run: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "3")
    (stopped / "result.json").unlink()
    assert "Resuming after epoch 2" in train(stopped, models=("regularised", "regularised"))
    assert_same_end(stopped, run)
    streams = {k: v for k, v in saved_state(run, 3).items() if "random_stream.count" in k}
    assert [int(count) for count in streams.values()] == [3 * 5, 3 * 5]


def test_an_exported_node_has_no_stream_and_works(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "node.safetensors"
    assert in_process(evaluate.main, run, "--export", path).code == 0
    tensors = {name: array for name, array in load_file(path).items() if "params" not in name}
    assert set(tensors) == {"batch_stats.norm.mean", "batch_stats.norm.var"}
    fns, params, state = ktg.load_node(path)
    images = jax.random.uniform(KEY, IMAGES.shape)
    logits, _ = fns.apply(params, state, images, False)
    variables = {"params": params, **unflatten_dict(tensors, sep=".")}
    expected: Any = Regularised(10).apply(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    first, state = fns.apply(params, state, images, True)
    assert differ(first, fns.apply(params, state, images, True)[0])


@pytest.mark.parametrize("model", ["regularised", "dropping"])
def test_weights_from_elsewhere_leave_a_node_its_own_numbers(model: str, tmp_path: Path) -> None:
    graph = ktg.graphs.mutual([ktg.Node(model, name) for name in "ab"])
    fns, path = ktg.build_model(model, 10), tmp_path / "node.safetensors"
    params, model_state = fns.init(jax.random.key(7), IMAGES)
    ktg.save_node(path, params, model_state, model=model, num_classes=10, image_shape=(8, 8, 1))
    before = ktg.init_state(graph, [fns, fns], optax.sgd(0.1), KEY, IMAGES)
    state = with_weights(
        with_weights(before, 0, load_weights(str(path))), 1, load_weights(str(path))
    )
    chex.assert_trees_all_equal(state.params, (params, params))
    images = jax.random.uniform(KEY, IMAGES.shape)
    logits = [fns.apply(params, state.model_state[i], images, True)[0] for i in range(2)]
    assert differ(*logits)
    for i in range(2):
        own, kept = (jax.tree.leaves(each.model_state[i]) for each in (before, state))
        keys = [(a, b) for a, b in zip(own, kept, strict=True) if a.dtype == KEY.dtype]
        assert keys
        assert all(bool(jnp.all(a == b)) for a, b in keys)
