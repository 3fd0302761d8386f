"""Optimisers of other people's: without a state, and those that ask for the loss."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models  # noqa: F401  (registers `tiny`)

import ktg_jax as ktg
from ktg_jax import GraphState, InputError, NodeFns
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.placement import place
from ktg_jax.training.updates import NoOptState, node_update

KEY = jax.random.key(0)
DEVICE = jax.local_devices()[0]
IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 1, 1, 3), np.float32))
LABELS = jnp.array([0, 1, 2, 0])
GRAPH = ktg.Graph(
    (ktg.Node("linear", "a"), ktg.Node("linear", "b"), ktg.Node("linear", "frozen")),
    (("through", "through", "through"), ("cutoff", "through", "cutoff"), ("cutoff",) * 3),
)
LINEAR = NodeFns(
    init=lambda rng, images: (jax.random.normal(rng, (3, 3)), {}),
    apply=lambda params, state, images, train: (images[:, 0, 0] @ params, state),
)
NODE_FNS = [LINEAR] * 3


def _subtract(gradients: Any, state: None, params: Any = None) -> tuple[Any, None]:
    """Plain gradient descent that insists on its state, None."""
    del params
    assert state is None
    return jax.tree.map(lambda g: -0.1 * g, gradients), None


STATELESS = optax.GradientTransformation(lambda params: None, _subtract)


def step_by(engine: str, state: GraphState, optimizer: optax.GradientTransformation) -> Any:
    fixed: dict[str, Any] = {"node_fns": NODE_FNS, "optimizer": optimizer}
    inputs = LABELS, GRAPH.gate_codes, 0.5
    if engine == "fused":
        return jax.jit(lambda state: ktg.train_step(state, IMAGES, *inputs, **fixed))(state)
    placement = (DEVICE,) * 3
    return per_node_step(
        place(state, placement), {DEVICE: IMAGES}, *inputs, **fixed, placement=placement
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "per_node"])
def test_an_optimiser_whose_state_is_none_trains_and_freezes_nobody(engine: str) -> None:
    before = ktg.init_state(GRAPH, NODE_FNS, STATELESS, KEY, IMAGES)
    assert before.opt_state == (NoOptState(), NoOptState(), None)
    state, plain = before, ktg.init_state(GRAPH, NODE_FNS, optax.sgd(0.1), KEY, IMAGES)
    start = jax.device_get(before.params)
    for _ in range(3):
        assert state.frozen == (2,)
        state, _ = step_by(engine, state, STATELESS)
        plain, _ = step_by(engine, plain, optax.sgd(0.1))
    assert state.frozen == (2,)
    chex.assert_trees_all_close(state.params, plain.params, rtol=1e-6)
    for i, moved in enumerate((True, True, False)):
        assert bool(np.any(np.asarray(state.params[i]) != start[i])) == moved
    chex.assert_trees_all_equal_structs(state, before)


@pytest.mark.parametrize("engine", ["fused", "per_node"])
def test_a_state_by_hand_in_which_it_froze_every_node_is_refused(engine: str) -> None:
    state = ktg.init_state(GRAPH, NODE_FNS, STATELESS, KEY, IMAGES)
    by_hand = state.replace(opt_state=tuple(map(STATELESS.init, state.params)))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"opt_state: got \(None, None, None\); allowed: NoOptSt"):
        step_by(engine, by_hand, STATELESS)
    frozen, _ = step_by(engine, by_hand, optax.sgd(0.1))  # by an optimiser that has a state
    chex.assert_trees_all_equal(frozen.params, state.params)


def test_a_checkpoint_of_it_is_read_as_one_that_it_froze(tmp_path: Any) -> None:
    state = ktg.init_state(GRAPH, NODE_FNS, STATELESS, KEY, IMAGES)
    names = [str(node.name) for node in GRAPH.nodes]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        # As it was written when the state of all nodes was None.
        former = state.replace(opt_state=(None,) * 3)  # type: ignore[attr-defined]
        checkpoints.save(1, former, names, None)
        checkpoints.save(2, step_by("fused", state, STATELESS)[0], names, None)
        checkpoints.wait()
        for epoch in (1, 2):
            assert checkpoints.restore(state, names, epoch).frozen == (2,)


def test_one_update_alone_takes_none_and_never_returns_it() -> None:
    params = jnp.array([1.0])
    given: Any
    for given in (None, NoOptState()):
        new, opt_state = node_update(params, given, jnp.array([5.0]), optimizer=STATELESS)
        np.testing.assert_allclose(new, [0.5])
        assert opt_state == NoOptState()


# --- the loss


def _by_loss() -> optax.GradientTransformationExtraArgs:
    """Moves every parameter down by the loss."""

    def update(gradients: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(lambda g: -value * jnp.ones_like(g), gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "per_node"])
@pytest.mark.parametrize("chained", [False, True])
def test_an_optimiser_is_given_the_nodes_own_loss(engine: str, chained: bool) -> None:
    optimizer = optax.chain(optax.identity(), _by_loss()) if chained else _by_loss()
    before = ktg.init_state(GRAPH, NODE_FNS, optimizer, KEY, IMAGES)
    start = jax.device_get(before.params)
    state, metrics = step_by(engine, before, optimizer)
    logits = [IMAGES[:, 0, 0] @ params for params in start]
    losses = np.sum(ktg.edge_losses(logits, LABELS, GRAPH.gate_codes, 0.5), axis=1)
    assert abs(losses[0] - losses[1]) > 0.1
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    for i, loss in enumerate([losses[0], losses[1], 0.0]):
        np.testing.assert_allclose(state.params[i], start[i] - loss, rtol=1e-5)


def test_under_pmap_it_is_the_loss_of_the_whole_batch() -> None:
    parallel, optimizer = ktg.Parallel("pmap", jax.local_devices()[:2]), _by_loss()
    state = ktg.init_state(GRAPH, NODE_FNS, optimizer, KEY, IMAGES)
    expected, _ = step_by("fused", state, optimizer)

    def step(state: GraphState, images: jax.Array, labels: jax.Array) -> Any:
        images, labels = parallel.shard((images, labels))
        fixed: dict[str, Any] = {"node_fns": NODE_FNS, "optimizer": optimizer}
        gates = GRAPH.gate_codes
        return ktg.train_step(state, images, labels, gates, 0.5, **fixed, axis_name="data")

    state, _ = parallel.compile(step)(parallel.replicate(state), IMAGES, LABELS)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "per_node"])
def test_reduce_on_plateau_lowers_each_nodes_rate_by_its_own_loss(engine: str) -> None:
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=10.0)
    optimizer = optax.chain(ktg.sgd(0.1), plateau)
    state = ktg.init_state(GRAPH, NODE_FNS, optimizer, KEY, IMAGES)
    scales = []
    for _ in range(3):
        state, _ = step_by(engine, state, optimizer)
        scales.append([float(state.opt_state[i][1].scale) for i in range(2)])
    # The first value is the best; no later one is better by 10.
    assert scales == [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]
    assert float(state.opt_state[0][1].best_value) != float(state.opt_state[1][1].best_value)


@pytest.mark.parametrize("engine", ["fused", "per_node"])
def test_an_optimiser_that_asks_for_more_is_refused(engine: str) -> None:
    optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    state = ktg.init_state(GRAPH, NODE_FNS, optimizer, KEY, IMAGES)
    with pytest.raises(InputError, match=r"optimizer: got .*'value_fn'.*; allowed: .*loss .value"):
        step_by(engine, state, optimizer)
