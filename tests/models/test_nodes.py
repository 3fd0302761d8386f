from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ktg_jax as ktg
from ktg_jax import InputError, NodeFns, from_linen, from_nnx

IMAGES = jnp.asarray(np.random.default_rng(0).random((8, 4, 4, 3), np.float32))
KEY = jax.random.key(0)


class Plain(nn.Module):
    """No argument `train`, no state."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(5)(images.reshape(len(images), -1))


class Normalised(nn.Module):
    """An argument `train` and batch statistics."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(images)
        return nn.Dense(5)(x.reshape(len(x), -1))


class Counting(nn.Module):
    """No argument `train`, no parameters, a collection of its own."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        count = self.variable("counts", "batches", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("counts") and not self.is_initializing():
            count.value += 1
        return jnp.mean(images, axis=(1, 2))


class NormalisedNNX(nnx.Module):
    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.classifier = nnx.Linear(48, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classifier(self.norm(images).reshape(len(images), -1))


class DroppingNNX(nnx.Module):
    def __init__(self, num_classes: int, rate: float = 0.5, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.classifier = nnx.Linear(48, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classifier(self.dropout(images.reshape(len(images), -1)))


def plain_nnx(*, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(4, 5, rngs=rngs)


STATEFUL = {
    "linen batch norm": from_linen(Normalised()),
    "nnx batch norm": from_nnx(NormalisedNNX, 5),
    "nnx dropout": from_nnx(DroppingNNX, num_classes=5, rate=0.2),
}
ALL = {"linen": from_linen(Plain()), **STATEFUL}


def started(fns: NodeFns) -> tuple[Any, Any]:
    return jax.jit(fns.init)(KEY, IMAGES)


def test_a_linen_module_without_state_has_none() -> None:
    fns = from_linen(Plain())
    params, model_state = started(fns)
    assert model_state == {}
    expected = Plain().apply({"params": params}, IMAGES)
    for train in (False, True):
        logits, unchanged = fns.apply(params, model_state, IMAGES, train)
        assert unchanged == {}
        np.testing.assert_array_equal(logits, expected)


def test_a_linen_modules_batch_statistics_are_its_model_state() -> None:
    fns = from_linen(Normalised())
    params, model_state = started(fns)
    assert set(params) == {"BatchNorm_0", "Dense_0"}
    assert set(model_state) == {"batch_stats"}
    _, updated = fns.apply(params, model_state, IMAGES, True)
    mean = jnp.mean(IMAGES, axis=(0, 1, 2))
    chex.assert_trees_all_close(
        updated["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * mean, atol=1e-6
    )


def test_other_collections_of_a_linen_module_are_model_state_too() -> None:
    fns = from_linen(Counting())
    params, model_state = started(fns)
    assert params == {}
    assert model_state["counts"]["batches"] == 0
    _, once = fns.apply(params, model_state, IMAGES, True)
    _, twice = fns.apply(params, once, IMAGES, True)
    _, still = fns.apply(params, twice, IMAGES, False)
    assert [s["counts"]["batches"] for s in (once, twice, still)] == [1, 2, 2]


def test_an_nnx_modules_params_are_its_param_variables_alone() -> None:
    params, model_state = started(from_nnx(NormalisedNNX, 5))
    assert {leaf.shape for leaf in jax.tree.leaves(params)} == {(3,), (48, 5), (5,)}
    assert [leaf.shape for leaf in jax.tree.leaves(model_state)] == [(3,), (3,)]


def test_an_nnx_module_computes_what_it_computes_by_itself() -> None:
    fns = from_nnx(NormalisedNNX, 5)
    params, model_state = fns.init(KEY, IMAGES)
    module = NormalisedNNX(5, rngs=nnx.Rngs(KEY))
    module.train()
    expected = module(IMAGES)
    logits, updated = fns.apply(params, model_state, IMAGES, True)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    chex.assert_trees_all_close(
        jax.tree.leaves(updated), jax.tree.leaves(nnx.state(module, nnx.BatchStat)), atol=1e-6
    )
    module.eval()
    logits, _ = fns.apply(params, updated, IMAGES, False)
    np.testing.assert_allclose(logits, module(IMAGES), atol=1e-6)


def test_nnx_dropout_draws_anew_in_training_and_rests_in_evaluation() -> None:
    fns = from_nnx(DroppingNNX, 5)
    params, model_state = started(fns)
    first, model_state_1 = fns.apply(params, model_state, IMAGES, True)
    again, _ = fns.apply(params, model_state, IMAGES, True)
    second, _ = fns.apply(params, model_state_1, IMAGES, True)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    evaluated, _ = fns.apply(params, model_state, IMAGES, False)
    evaluated_later, _ = fns.apply(params, model_state_1, IMAGES, False)
    np.testing.assert_array_equal(evaluated, evaluated_later)
    kernel, bias = params["classifier"]["kernel"][...], params["classifier"]["bias"][...]
    np.testing.assert_allclose(evaluated, IMAGES.reshape(8, 48) @ kernel + bias, atol=1e-5)


def test_an_nnx_module_may_come_from_a_function() -> None:
    fns = from_nnx(plain_nnx)
    params, model_state = started(fns)
    logits, _ = fns.apply(params, model_state, IMAGES[..., 0].reshape(-1, 4), True)
    assert logits.shape == (32, 5)


def test_a_finished_nnx_module_is_refused() -> None:
    module: Any = NormalisedNNX(5, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="create: got 'NormalisedNNX'; allowed: a module's class"):
        from_nnx(module)


@pytest.mark.parametrize("fns", ALL.values(), ids=ALL.keys())
def test_weights_depend_on_the_key(fns: NodeFns) -> None:
    init = jax.jit(fns.init)
    params = init(KEY, IMAGES)[0]
    chex.assert_trees_all_equal(init(KEY, IMAGES)[0], params)
    other = init(jax.random.key(1), IMAGES)[0]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(other, params, atol=0.01)


@pytest.mark.parametrize("fns", STATEFUL.values(), ids=STATEFUL.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_training_updates_the_state_and_evaluation_leaves_it(fns: NodeFns, compiled: bool) -> None:
    apply = jax.jit(fns.apply, static_argnums=3) if compiled else fns.apply
    params, model_state = started(fns)
    logits, updated = apply(params, model_state, IMAGES, True)
    assert logits.shape == (8, 5)
    chex.assert_trees_all_equal_structs(updated, model_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, model_state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(updated, model_state)
    _, unchanged = apply(params, updated, IMAGES, False)
    chex.assert_trees_all_equal(unchanged, updated)


def test_linen_and_nnx_learn_from_each_other_in_one_step() -> None:
    node_fns = tuple(ALL.values())
    graph = ktg.graphs.mutual([name.replace(" ", "-") for name in ALL])
    optimizer = optax.sgd(0.1, momentum=0.9)
    gates = jnp.asarray(graph.gate_codes)
    before = ktg.init_state(graph, node_fns, optimizer, KEY, IMAGES)
    labels = jnp.arange(8) % 5

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: ktg.GraphState, progress: float) -> Any:
        return ktg.train_step(
            state,
            IMAGES,
            labels,
            gates,
            progress,
            node_fns=node_fns,
            optimizer=optimizer,
        )

    state, losses = before, []
    for k in range(1, 21):
        state, metrics = step(state, k / 20)
        losses.append(metrics["loss"])
    assert (losses[-1] < losses[0]).all()
    chex.assert_trees_all_equal_structs(state, before)
    for i in range(1, 4):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(state.model_state[i], before.model_state[i])
    counts = jax.jit(lambda state: ktg.eval_step(state, IMAGES, labels, node_fns=node_fns))(state)
    assert counts["correct"].shape == (4,)
