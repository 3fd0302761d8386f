import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_variables import random_variables
from tiny_models import Tiny

import ktg_jax as ktg
from ktg_jax import Graph, GraphState, InputError, Node, NodeFns

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.random((8, 4, 4, 3), np.float32))
LABELS = jnp.arange(8) % 5
KEY = jax.random.key(0)
OPTIMIZER = ktg.sgd(0.1)

TINY = ktg.from_linen(Tiny(5))

Step = Callable[..., tuple[GraphState, dict[str, jax.Array]]]

SHORT = {"t": "through", "c": "cutoff", "l": "linear", "r": "correct", "n": "negative_linear"}


def graph_of(*rows: str, names: str = "abcd", temperature: float = 1.0) -> Graph:
    """A graph of tiny nodes, with the gates in short."""
    nodes = tuple(Node("tiny", name) for name in names[: len(rows)])
    return Graph(nodes, tuple(tuple(SHORT[gate] for gate in row) for row in rows), temperature)


def codes(graph: Graph) -> jax.Array:
    return jnp.asarray(graph.gate_codes)


def started(graph: Graph) -> GraphState:
    return ktg.init_state(graph, [TINY] * len(graph.nodes), OPTIMIZER, KEY, IMAGES)


def compiled(node_fns: Sequence[NodeFns]) -> Step:
    @jax.jit
    def step(
        state: GraphState, images: Any, labels: Any, gates: Any, progress: Any, temperature: Any = 1
    ) -> Any:
        fixed: dict[str, Any] = {"node_fns": node_fns, "optimizer": OPTIMIZER}
        return ktg.train_step(
            state, images, labels, gates, progress, temperature=temperature, **fixed
        )

    return step


@functools.cache
def tiny_step(num_nodes: int) -> Step:
    """The step of so many tiny nodes; compiled once for all tests."""
    return compiled([TINY] * num_nodes)


def trained(graph: Graph, steps: int = 4) -> GraphState:
    state, step = started(graph), tiny_step(len(graph.nodes))
    for k in range(steps):
        images, progress = jnp.roll(IMAGES, k, axis=2), (k + 1) / steps
        state, _ = step(state, images, LABELS, codes(graph), progress, graph.temperature)
    return state


def node_of(state: GraphState, i: int) -> Any:
    """Everything of a node."""
    return state.params[i], state.model_state[i], state.opt_state[i]


def assert_trees_differ(a: Any, b: Any) -> None:
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(a, b, atol=1e-5)


MIXED = Graph(
    (Node("resnet8", "a"), Node("wrn10_2", "b"), Node("resnet8", "c")),
    (
        ("through", "correct", "linear"),
        ("negative_linear", "correct", "through"),
        ("correct", "cutoff", "linear"),
    ),
    temperature=2.0,
)
WITH_TEACHER = Graph(
    (Node("resnet8", "student"), Node("wrn10_2", "teacher")),
    (("through", "correct"), ("cutoff", "cutoff")),
    temperature=4.0,
)


@pytest.mark.parametrize("graph", [MIXED, WITH_TEACHER], ids=["mixed", "with frozen teacher"])
def test_training_is_the_same_as_in_torch(graph: Graph) -> None:
    reference = pytest.importorskip("torch_reference")
    rng = np.random.default_rng(1)
    images, labels = rng.random((4, 16, 8, 8, 3), np.float32), rng.integers(5, size=(4, 16))
    node_fns = [ktg.build_model(node.model, 5) for node in graph.nodes]
    variables = [random_variables(fns, images[0], seed=i) for i, fns in enumerate(node_fns)]
    params, model_state = zip(*variables, strict=True)
    opt_state = tuple(
        None if i in graph.frozen else OPTIMIZER.init(p) for i, p in enumerate(params)
    )
    state = GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
    step = compiled(node_fns)
    networks = [
        reference.build(node.model, *node_variables)
        for node, node_variables in zip(graph.nodes, variables, strict=True)
    ]
    trainer = reference.Trainer(networks, graph.gates, learning_rate=0.1)

    for k in range(1, 5):
        batch = images[k - 1], labels[k - 1]
        state, metrics = step(state, *batch, codes(graph), k / 4, graph.temperature)
        losses, accuracies = trainer.step(*batch, k / 4, graph.temperature)
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(metrics["accuracy"], accuracies, atol=1e-6)

    @jax.jit
    def evaluate() -> list[jax.Array]:
        nodes = zip(node_fns, state.params, state.model_state, strict=True)
        return [fns.apply(p, m, images[0], False)[0] for fns, p, m in nodes]

    for i, (network, logits) in enumerate(zip(networks, evaluate(), strict=True)):
        theirs = network.state_dict()
        for key, ours in reference.to_torch(state.params[i], state.model_state[i]).items():
            np.testing.assert_allclose(
                ours, theirs[key], rtol=1e-4, atol=1e-4, err_msg=f"node {i} {key}"
            )
        with reference.torch.no_grad():
            expected = network.eval()(reference.to_nchw(images[0]).double())
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- initial state


def test_a_nodes_initial_weights_depend_on_its_name_and_the_key_alone() -> None:
    state = started(graph_of("tcc", "ctc", "cct", names="abc"))
    other = started(graph_of("tt", "cc", names="ca"))
    chex.assert_trees_all_equal(state.params[2], other.params[0])
    chex.assert_trees_all_equal(state.params[0], other.params[1])
    assert_trees_differ(state.params[0], state.params[1])
    reseeded = ktg.init_state(graph_of("t"), [TINY], OPTIMIZER, jax.random.key(1), IMAGES)
    assert_trees_differ(reseeded.params[0], state.params[0])


def test_a_state_has_an_entry_for_every_node_and_begins_at_step_0() -> None:
    state = started(graph_of("ttt", "ccc", "ccl"))
    assert len(state.params) == len(state.model_state) == len(state.opt_state) == 3
    assert state.step == 0
    assert state.step.dtype == jnp.int32
    assert state.frozen == (1,)
    assert state.opt_state[1] is None


def test_the_number_of_node_functions_must_be_that_of_nodes() -> None:
    with pytest.raises(InputError, match="node_fns: got 1; allowed: 2 functions, one a node"):
        ktg.init_state(graph_of("tt", "tt"), [TINY], OPTIMIZER, KEY, IMAGES)


# ----------------------------------------------------------------------------------- train_step


def test_a_single_node_trains_as_without_a_graph() -> None:
    graph = graph_of("t")
    state = started(graph)

    @jax.jit
    def plain_step(params: Any, model_state: Any, opt_state: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits, new_state = TINY.apply(params, model_state, IMAGES, True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean(), new_state

        gradients, new_state = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state_ = OPTIMIZER.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), new_state, opt_state_

    step, expected = tiny_step(1), node_of(state, 0)
    for k in range(1, 4):
        state, _ = step(state, IMAGES, LABELS, codes(graph), k / 3)
        expected = plain_step(*expected)
        chex.assert_trees_all_close(node_of(state, 0), expected, atol=1e-6)
        assert state.step == k


def test_metrics_are_losses_and_accuracies_before_the_update() -> None:
    graph = graph_of("trl", "ctn", "lcr", temperature=3.0)
    state = started(graph)
    forward = jax.jit(TINY.apply, static_argnums=3)
    logits = [forward(state.params[i], state.model_state[i], IMAGES, True)[0] for i in range(3)]
    _, metrics = tiny_step(3)(state, IMAGES, LABELS, codes(graph), 0.25, 3.0)
    expected = jax.jit(ktg.edge_losses)(logits, LABELS, codes(graph), 0.25, 3.0)
    np.testing.assert_allclose(metrics["edge_losses"], expected, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected.sum(axis=1), atol=1e-5)
    accuracy = [np.mean(np.argmax(z, axis=1) == LABELS) for z in logits]
    np.testing.assert_array_equal(metrics["accuracy"], np.array(accuracy, np.float32))
    assert {key: (m.shape, m.dtype) for key, m in metrics.items()} == {
        "edge_losses": ((3, 3), jnp.float32),
        "loss": ((3,), jnp.float32),
        "accuracy": ((3,), jnp.float32),
    }


def test_frozen_nodes_keep_every_bit_and_teach_with_their_stored_statistics() -> None:
    graph = graph_of("ttl", "ccc", "ctt", temperature=2.0)
    before = started(graph)
    stored = {"batch_stats": jax.tree.map(lambda x: x + 0.5, before.model_state[1]["batch_stats"])}
    model_state = (before.model_state[0], stored, before.model_state[2])
    before = before.replace(model_state=model_state)  # type: ignore[attr-defined]
    step, state = tiny_step(3), before
    for k in range(1, 4):
        student = TINY.apply(state.params[0], state.model_state[0], IMAGES, True)[0]
        teacher = TINY.apply(before.params[1], stored, IMAGES, False)[0]
        state, metrics = step(state, IMAGES, LABELS, codes(graph), k / 3, 2.0)
        expected = ktg.kl_divergence(student, teacher, 2.0).mean()
        np.testing.assert_allclose(metrics["edge_losses"][0, 1], expected, rtol=1e-4)
        assert metrics["loss"][1] == 0
    chex.assert_trees_all_equal(node_of(state, 1), node_of(before, 1))
    assert state.opt_state[1] is None
    for i in (0, 2):
        for part, part_before in zip(node_of(state, i), node_of(before, i), strict=True):
            assert_trees_differ(part, part_before)


def test_nothing_of_a_node_changes_with_what_it_receives_no_edge_from() -> None:
    step = tiny_step(2)
    before = started(graph_of("tc", "tt"))
    perturbed = before.replace(  # type: ignore[attr-defined]
        params=(before.params[0], jax.tree.map(lambda x: x + 0.3, before.params[1]))
    )

    def first_node(state: GraphState, *rows: str) -> Any:
        for k in (1, 2):
            state, metrics = step(state, IMAGES, LABELS, codes(graph_of(*rows)), k / 2)
        return node_of(state, 0), metrics["edge_losses"][0]

    alone = first_node(before, "tc", "tt")
    for second_row in ("ct", "rn", "cc", "ll"):
        chex.assert_trees_all_equal(first_node(before, "tc", second_row), alone)
    chex.assert_trees_all_equal(first_node(perturbed, "tc", "tt"), alone)
    # With an edge, all of that matters: the test can fail.
    taught = first_node(before, "tt", "tt")
    assert_trees_differ(taught, alone)
    assert_trees_differ(first_node(before, "tt", "ct"), taught)
    assert_trees_differ(first_node(perturbed, "tt", "tt"), taught)


def test_a_diverged_node_does_not_disturb_those_it_is_cut_off_from() -> None:
    step, graph = tiny_step(2), graph_of("tc", "tt")
    before = started(graph)
    diverged = before.replace(  # type: ignore[attr-defined]
        params=(before.params[0], jax.tree.map(lambda x: x * jnp.nan, before.params[1]))
    )
    expected, _ = step(before, IMAGES, LABELS, codes(graph), 1.0)
    state, metrics = step(diverged, IMAGES, LABELS, codes(graph), 1.0)
    chex.assert_trees_all_equal(node_of(state, 0), node_of(expected, 0))
    assert np.isnan(metrics["loss"][1])


def test_one_program_serves_every_gate_matrix_and_each_gate_acts() -> None:
    graph, traces = graph_of("tt", "tt"), []
    rows = ("tt", "tc", "tl", "tr", "tn", "rt", "lt", "nt")

    @jax.jit
    def step(state: GraphState, gates: jax.Array) -> Any:
        traces.append("one more")
        return ktg.train_step(
            state, IMAGES, LABELS, gates, 0.3, node_fns=[TINY] * 2, optimizer=OPTIMIZER
        )

    results = []
    for row in rows:
        after_one, _ = step(started(graph), codes(graph_of(row, "tt")))
        after_two, _ = step(after_one, codes(graph))
        results.append(after_two.params[0])
    assert traces == ["one more"]
    # The label edge's `correct` is `through`; all else differs.
    chex.assert_trees_all_close(results[rows.index("rt")], results[rows.index("tt")], atol=1e-7)
    distinct = [result for row, result in zip(rows, results, strict=True) if row != "rt"]
    for i, result in enumerate(distinct):
        for other in distinct[:i]:
            with pytest.raises(AssertionError):
                chex.assert_trees_all_close(result, other, atol=1e-6)


def test_the_three_pieces_compose_to_the_step() -> None:
    graph = graph_of("trl", "ccc", "ntt", temperature=2.0)
    state = started(graph)
    expected, expected_metrics = tiny_step(3)(state, IMAGES, LABELS, codes(graph), 0.5, 2.0)

    # One program for each node's forward pass, one for all losses, one for each node's update.
    logits, pullbacks, model_states = [], [], []
    for i in range(3):

        def forward(params: Any, i: int = i) -> Any:
            return ktg.node_forward(
                params, state.model_state[i], IMAGES, fns=TINY, frozen=i in graph.frozen
            )

        z, pullback, model_state = jax.vjp(jax.jit(forward), state.params[i], has_aux=True)
        logits.append(z)
        pullbacks.append(pullback)
        model_states.append(model_state)
    gradients, metrics = jax.jit(ktg.graph_gradients)(logits, LABELS, codes(graph), 0.5, 2.0)
    update = jax.jit(lambda *node: ktg.node_update(*node, optimizer=OPTIMIZER))
    for i in range(3):
        params, opt_state = state.params[i], state.opt_state[i]
        if i not in graph.frozen:
            params, opt_state = update(params, opt_state, pullbacks[i](gradients[i])[0])
        chex.assert_trees_all_close(
            (params, model_states[i], opt_state), node_of(expected, i), atol=1e-6
        )
    chex.assert_trees_all_close(metrics, expected_metrics, atol=1e-6)


def test_nodes_of_one_network_in_one_pass_are_trained_as_apart() -> None:
    other = ktg.build_model("cnn", 5)
    node_fns = [TINY, other, TINY, TINY, other]
    nodes = [Node("cnn" if fns is other else "tiny") for fns in node_fns]
    gates = tuple((gate,) * 5 for gate in ("through", "linear", "correct", "cutoff", "through"))
    graph = Graph(tuple(nodes), gates)
    assert graph.frozen == (3,)
    states = []
    for batched in (False, True):
        step = jax.jit(
            functools.partial(
                ktg.train_step, node_fns=node_fns, optimizer=OPTIMIZER, batched=batched
            )
        )
        state = ktg.init_state(graph, node_fns, OPTIMIZER, KEY, IMAGES)
        for k in (1, 2):
            state, metrics = step(state, IMAGES, LABELS, graph.edge_arrays, k / 2)
        states.append((state, metrics))
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)
    assert_trees_differ(node_of(states[1][0], 0), node_of(states[1][0], 2))


def test_graph_gradients_are_those_of_each_nodes_own_loss_in_its_own_dtype() -> None:
    gates = codes(graph_of("trl", "ctn", "lcr"))
    logits = [jnp.asarray(RNG.standard_normal((8, 5)), jnp.float32) for _ in range(3)]
    logits[1] = logits[1].astype(jnp.bfloat16)
    gradients, _ = jax.jit(ktg.graph_gradients)(logits, LABELS, gates, 0.5, 2.0)
    assert [g.dtype for g in gradients] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for t, gradient in enumerate(gradients):

        def own_loss(z: jax.Array, t: int = t) -> jax.Array:
            given = [*logits[:t], z, *logits[t + 1 :]]
            return ktg.node_losses(given, LABELS, gates, 0.5, 2.0)[t]

        np.testing.assert_allclose(
            gradient.astype(jnp.float32),
            jax.jit(jax.grad(own_loss))(logits[t]).astype(jnp.float32),
            atol=1e-6,
        )
        assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    "rows",
    [("ttcc", "ctcc", "tttt", "tttt"), ("tctc", "cttt", "ccrc", "tttt"), ("tctc",) + ("cccc",) * 3],
    ids=["helper in front", "helper behind what is dropped", "frozen helper"],
)
def test_the_target_of_a_pruned_graph_trains_as_in_the_whole_one(rows: tuple[str, ...]) -> None:
    whole = graph_of(*rows, temperature=2.0)
    pruned = whole.pruned()
    assert len(pruned.nodes) == 2
    whole_state = trained(whole)
    pruned_state = trained(pruned)
    for i, kept in enumerate(whole.needed_nodes()):
        chex.assert_trees_all_close(
            node_of(pruned_state, i), node_of(whole_state, kept), atol=1e-6, rtol=1e-5
        )
    assert_trees_differ(pruned_state.params[0], started(whole).params[0])


def test_mixed_precision_keeps_the_state_in_float32() -> None:
    fns, graph = ktg.from_linen(Tiny(5, dtype=jnp.bfloat16)), graph_of("tt", "rt")
    state = ktg.init_state(graph, [fns] * 2, OPTIMIZER, KEY, IMAGES)
    fine, _ = tiny_step(2)(state, IMAGES, LABELS, codes(graph), 0.5)
    coarse, metrics = compiled([fns] * 2)(state, IMAGES, LABELS, codes(graph), 0.5)
    chex.assert_trees_all_equal_dtypes(coarse, state)
    chex.assert_type(jax.tree.leaves(metrics), jnp.float32)
    chex.assert_trees_all_close(coarse.params, fine.params, atol=0.02)


# ------------------------------------------------------------------------------------ eval_step


def test_eval_step_sums_over_samples_by_hand() -> None:
    # Node i's logits are its own multiple of the pixels; 2 classes, 3 samples.
    fns = NodeFns(
        init=lambda rng, images: (jnp.zeros(2), ()),
        apply=lambda scale, none, images, train: (images[:, 0, 0, :] * scale[None], none),
    )
    scales = (jnp.array([1.0, 1.0]), jnp.array([1.0, -2.0]))
    state = GraphState(scales, ((), ()), (None, None), jnp.zeros((), jnp.int32))
    pixels = np.log(np.array([[1, 3], [4, 1], [1, 2]], np.float32))
    images, labels = jnp.asarray(pixels[:, None, None, :]), jnp.array([1, 0, 0])
    evaluate = jax.jit(lambda *args: ktg.eval_step(state, *args, node_fns=[fns, fns]))

    # Odds of class 1 against 0: node 0: 3, 1/4, 2; node 1: 1/9, 1/4, 1/4 (the first pixel kept);
    # the ensemble's odds are the products.
    odds = np.array([[3, 1 / 4, 2], [1 / 9, 1 / 4, 1 / 4]])
    odds = np.vstack([odds, odds.prod(axis=0)])
    right = np.array([odds[:, 0], 1 / odds[:, 1], 1 / odds[:, 2]]).T  # odds of the label
    loss, correct = np.log1p(1 / right), right > 1

    for mask in (None, [True, True, True], [True, False, True], [False] * 3):
        counts = np.ones(3, bool) if mask is None else np.array(mask)
        sums = evaluate(images, labels) if mask is None else evaluate(images, labels, counts)
        assert sums["count"] == counts.sum()
        np.testing.assert_allclose(sums["loss"], (loss * counts)[:2].sum(axis=1), rtol=1e-5)
        np.testing.assert_allclose(sums["ensemble_loss"], (loss * counts)[2].sum(), rtol=1e-5)
        np.testing.assert_array_equal(sums["correct"], (correct * counts)[:2].sum(axis=1))
        assert sums["ensemble_correct"] == (correct * counts)[2].sum()
        chex.assert_type(list(sums.values()), jnp.float32)


def test_padding_does_not_matter_whatever_it_holds() -> None:
    state = started(graph_of("tt", "tt"))
    evaluate = jax.jit(lambda *args: ktg.eval_step(state, *args, node_fns=[TINY] * 2))
    padded = IMAGES.at[5:].set(jnp.nan)
    sums = evaluate(padded, LABELS, jnp.arange(8) < 5)
    chex.assert_trees_all_close(sums, evaluate(IMAGES[:5], LABELS[:5]), atol=1e-5)


def test_evaluation_uses_stored_statistics_and_adds_up_over_batches() -> None:
    state = started(graph_of("tt", "tt"))
    evaluate = jax.jit(lambda *args: ktg.eval_step(state, *args, node_fns=[TINY] * 2))
    whole = evaluate(IMAGES, LABELS)
    halves = [evaluate(IMAGES[i : i + 4], LABELS[i : i + 4]) for i in (0, 4)]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *halves), whole, atol=1e-5)
