from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers `tiny`)
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax import GraphState, InputError, Parallel
from ktg_jax.training.batches import plan_batch, take_batch

DEVICES = jax.local_devices()
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(256, size=(20, 8, 8, 3), dtype=np.uint8)
LABELS = RNG.integers(5, size=20)
GRAPH = ktg.Graph(
    (ktg.Node("cnn"), ktg.Node("tiny"), ktg.Node("tiny")),
    (
        ("through", "correct", "linear"),
        ("correct", "through", "negative_linear"),
        ("cutoff", "cutoff", "cutoff"),
    ),
)
OPTIMIZER = ktg.sgd(0.1)

ARRANGEMENTS = [
    (strategy, number) for strategy in ("jit", "shard_map", "pmap") for number in (1, 2)
]


def node_fns(axis_name: str | None) -> list[ktg.NodeFns]:
    return [ktg.build_model(node.model, 5, axis_name=axis_name) for node in GRAPH.nodes]


def started() -> GraphState:
    variables = [random_variables(fns, IMAGES[:1], i) for i, fns in enumerate(node_fns(None))]
    params, model_state = zip(*variables, strict=True)
    opt_state = *(OPTIMIZER.init(p) for p in params[:2]), None
    return GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))


def batch_of(key: jax.Array, step: jax.Array, data: Any, parallel: Parallel | None = None) -> Any:
    images, labels = data
    plan = plan_batch(key, step, num_images=20, batch_size=8, max_offset=2, flip=True)
    return take_batch(images, labels, plan if parallel is None else parallel.shard(plan))


def train_three_steps(parallel: Parallel) -> tuple[GraphState, list[Any], bool]:
    """Final state, the metrics of each step, and whether every old state was deleted."""

    def step(state: GraphState, key: jax.Array, data: Any, gates: jax.Array) -> Any:
        images, labels = batch_of(key, state.step, data, parallel)
        return ktg.train_step(
            state,
            images,
            labels,
            gates,
            (state.step + 1) / 3,
            node_fns=node_fns(parallel.axis_name),
            optimizer=OPTIMIZER,
            temperature=2.0,
            axis_name=parallel.axis_name,
        )

    compiled = parallel.compile(step)
    inputs = parallel.replicate((jax.random.key(0), (IMAGES, LABELS), GRAPH.gate_codes))
    state, history, deleted = parallel.replicate(started()), [], True
    for _ in range(3):
        old_leaves = jax.tree.leaves(state)
        state, metrics = compiled(state, *inputs)
        deleted &= all(leaf.is_deleted() for leaf in old_leaves)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history, deleted


@pytest.fixture(scope="module")
def expected() -> tuple[GraphState, list[Any]]:
    """The same three steps on one device, without `Parallel`."""

    @jax.jit
    def step(state: GraphState) -> Any:
        data = jnp.asarray(IMAGES), jnp.asarray(LABELS)
        images, labels = batch_of(jax.random.key(0), state.step, data)
        return ktg.train_step(
            state,
            images,
            labels,
            jnp.asarray(GRAPH.gate_codes),
            (state.step + 1) / 3,
            node_fns=node_fns(None),
            optimizer=OPTIMIZER,
            temperature=2.0,
        )

    state, history = started(), []
    for _ in range(3):
        state, metrics = step(state)
        history.append(metrics)
    return state, history


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_devices"), ARRANGEMENTS)
def test_training_is_the_same_on_any_devices_and_reuses_the_states_memory(
    strategy: str, num_devices: int, expected: tuple[GraphState, list[Any]]
) -> None:
    parallel = Parallel(strategy, DEVICES[:num_devices])
    state, history, deleted = train_three_steps(parallel)
    expected_state, expected_history = expected
    chex.assert_trees_all_close(history, expected_history, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-4, atol=1e-5)
    assert deleted
    assert state.step == 3
    # The test can fail: the weights have moved by much more than its tolerance.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.params[0], started().params[0], atol=1e-2)


def test_under_jit_a_batch_is_split_over_the_devices() -> None:
    parallel = Parallel("jit", DEVICES[:2])
    batch = jnp.arange(24).reshape(8, 3)
    for part in jax.jit(lambda x: parallel.shard({"x": x, "y": x[:, 0]}))(batch).values():
        assert part.sharding.shard_shape(part.shape)[0] == 4
        np.testing.assert_array_equal(part[:, 0] if part.ndim == 2 else part, batch[:, 0])


@pytest.mark.parametrize("num_devices", [1, 2])
def test_under_pmap_each_device_takes_its_own_share(num_devices: int) -> None:
    parallel = Parallel("pmap", DEVICES[:num_devices])
    batch = jnp.arange(24).reshape(8, 3)
    shares = jax.pmap(
        lambda _, x: parallel.shard(x),
        axis_name=parallel.axis_name,
        in_axes=(0, None),
        devices=parallel.devices,
    )(np.arange(num_devices), batch)
    assert shares.shape == (num_devices, 8 // num_devices, 3)
    np.testing.assert_array_equal(shares.reshape(8, 3), batch)


@pytest.mark.parametrize(("strategy", "num_devices"), ARRANGEMENTS)
def test_replicate_puts_a_whole_copy_on_every_device(strategy: str, num_devices: int) -> None:
    tree = {"a": np.arange(6).reshape(2, 3), "b": jax.random.key(3)}
    copied = Parallel(strategy, DEVICES[:num_devices]).replicate(tree)
    for leaf in jax.tree.leaves(copied):
        assert leaf.sharding.is_fully_replicated
        assert leaf.devices() == set(DEVICES[:num_devices])
    np.testing.assert_array_equal(copied["a"], tree["a"])
    np.testing.assert_array_equal(
        jax.random.key_data(copied["b"]), jax.random.key_data(jax.random.key(3))
    )


def test_every_local_device_is_used_by_default_under_jit() -> None:
    parallel = Parallel()
    assert parallel.strategy == "jit"
    assert list(parallel.devices) == DEVICES


def test_jit_alone_maps_no_axis() -> None:
    assert Parallel("jit").axis_name is None
    assert Parallel("pmap").axis_name == Parallel("shard_map").axis_name == "data"


@pytest.mark.parametrize("strategy", ["vmap", "", "JIT"])
def test_an_unknown_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(
        InputError, match=f"parallel: got '{strategy}'; allowed: jit, shard_map, pmap"
    ):
        Parallel(strategy)


@pytest.mark.parametrize("strategy", ["jit", "shard_map", "pmap"])
def test_a_batch_that_cannot_be_split_evenly_is_refused(strategy: str) -> None:
    parallel = Parallel(strategy, DEVICES[:2])
    parallel.check_batch_size(8)
    with pytest.raises(InputError, match="batch_size: got 7; allowed: a multiple of 2, the number"):
        parallel.check_batch_size(7)
    Parallel(strategy, DEVICES[:1]).check_batch_size(7)
