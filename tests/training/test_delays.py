"""Stale edges: a receiver hears its sender as it was some updates ago."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engines import How, fused
from tiny_models import Staged

import ktg_jax as ktg
from ktg_jax import Edge, Graph, GraphState, InputError, Node
from ktg_jax.edge_arrays import Delayed
from ktg_jax.losses import cross_entropy
from ktg_jax.training.batches import Arrays, Batches, data_key, take_batch
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.task import Task

DEVICES = jax.local_devices()
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 8, 8, 1), np.uint8)
LABELS = np.asarray(np.arange(20) % 5, np.int32)
BATCHES = Batches(20, batch_size=8, max_offset=1, flip=True)
STEPS, RATE = 7, 0.5
OPTIMIZER = optax.sgd(RATE)


def apply(params: Any, state: Any, images: jax.Array, train: bool) -> Any:
    """Its scale moves with each training pass, as statistics do; stored, it is not yet moved."""
    scale = state["scale"] + (0.1 if train else 0.0)
    logits = scale * (images.reshape(len(images), -1) @ params)
    return logits, {"scale": scale} if train else state


def init(rng: jax.Array, images: jax.Array) -> Any:
    params = 0.1 * jax.random.normal(rng, (int(np.prod(images.shape[1:])), 5))
    return params, {"scale": jnp.ones(())}


LINEAR = ktg.NodeFns(init, apply)
NAMES = [Node("linear", "a"), Node("linear", "b"), Node(name="mean", average="b", decay=0.5)]
GRAPH = Graph(
    NAMES,
    [
        ["through", Edge("correct", delay=2), Edge("linear", weight=0.5, delay=1)],
        [Edge(delay=3, temperature=2.0), "through", "cutoff"],
        ["cutoff", "cutoff", "cutoff"],
    ],
)


def initial(graph: Graph, fns: Any, batch: int = 8) -> GraphState:
    images = jnp.zeros((batch, *IMAGES.shape[1:]))
    state = ktg.init_state(graph, fns, OPTIMIZER, jax.random.key(1), images)
    return ktg.with_delays(state, graph.edge_arrays, fns, images)


def by_hand() -> list[Any]:
    """The parameters of all nodes, from what each was in the updates before."""
    state = initial(GRAPH, [LINEAR] * 3)
    history = [(state.params, state.model_state)]
    for k in range(STEPS):
        history.append(updated_by_hand(history, k))
    return [np.asarray(w) for w in history[-1][0]]


def updated_by_hand(history: list[Any], k: int) -> Any:
    """Parameters and states after an update, from those after all updates before."""
    params, states = (list(part) for part in history[-1])
    images, labels = take_batch(
        jnp.asarray(IMAGES), jnp.asarray(LABELS), BATCHES.plan(data_key(0), k)
    )

    def said(node: int, delay: int) -> Any:
        if k < delay:
            return None
        then = history[k - delay]
        return apply(then[0][node], then[1][node], images, False)[0]

    def kl(ours: jax.Array, theirs: jax.Array, t: float = 1.0) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(z / t) for z in (theirs, ours))
        return t**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def loss_a(w: Any) -> Any:
        ours = apply(w, states[0], images, True)[0]
        total = cross_entropy(ours, labels).mean()
        if (b := said(1, 2)) is not None:
            total += jnp.mean(kl(ours, b) * (jnp.argmax(b, -1) == labels))
        if (mean := said(2, 1)) is not None:
            total += 0.5 * (k + 1) / STEPS * jnp.mean(kl(ours, mean))
        return total

    def loss_b(w: Any) -> Any:
        ours = apply(w, states[1], images, True)[0]
        total = cross_entropy(ours, labels).mean()
        if (a := said(0, 3)) is not None:
            total += jnp.mean(kl(ours, a, 2.0))
        return total

    new = [params[i] - RATE * jax.grad(f)(params[i]) for i, f in enumerate((loss_a, loss_b))]
    stats = [{"scale": states[i]["scale"] + 0.1} for i in range(2)]
    new.append(0.5 * params[2] + 0.5 * new[1])
    stats.append({"scale": 0.5 * states[2]["scale"] + 0.5 * stats[1]["scale"]})
    return tuple(new), tuple(stats)


ENGINES: dict[str, How] = {
    "fused": fused(devices=DEVICES[:1]),
    "fused, seven a call": fused(7, devices=DEVICES[:1]),
    "jit": fused(devices=DEVICES[:2]),
    "shard_map": fused(devices=DEVICES[:2], strategy="shard_map"),
    "pmap": fused(devices=DEVICES[:2], strategy="pmap"),
    "per node": lambda task, state: (PerNodeEngine(task, state, DEVICES[:2]), 1),
    "per node, data": lambda task, state: (PerNodeEngine(task, state, DEVICES[:2], "data"), 1),
}


def trained(
    how: How, graph: Graph, fns: Any, state: GraphState, steps: int = STEPS, **options: Any
) -> GraphState:
    task = Task(fns, OPTIMIZER, BATCHES, (8, 8, 1), STEPS, graph.derived, **options)
    engine, count = how(task, state)
    data, state = engine.load(Arrays(IMAGES, LABELS)), engine.place(state)
    step = engine.make_step(data, graph.edge_arrays, data_key(0))
    for _ in range(0, steps, count):
        state, _ = step(state, count)
    made: GraphState = jax.device_get(state)
    return made


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return by_hand()


@pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)
def test_receivers_hear_senders_as_they_were(how: How, expected: list[Any]) -> None:
    state = trained(how, GRAPH, [LINEAR] * 3, initial(GRAPH, [LINEAR] * 3))
    chex.assert_trees_all_close(list(state.params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fused", "per node"])
def test_it_is_the_same_in_parts_where_samples_do_not_meet(name: str) -> None:
    def plain(params: Any, state: Any, images: jax.Array, train: bool) -> Any:
        return images.reshape(len(images), -1) @ params, state

    fns = [ktg.NodeFns(init, plain)] * 3
    whole, parts = (
        trained(ENGINES[name], GRAPH, fns, initial(GRAPH, fns), accumulate=parts)
        for parts in (1, 4)
    )
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-4, atol=1e-6)


def test_what_is_late_matters() -> None:
    """Or the tests above would say nothing."""
    soon = Graph(
        NAMES, [[Edge(e.gate, e.loss, e.weight, e.temperature) for e in row] for row in GRAPH.edges]
    )
    state = trained(ENGINES["fused"], soon, [LINEAR] * 3, initial(soon, [LINEAR] * 3))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(list(state.params), by_hand(), atol=1e-3)


@pytest.mark.parametrize("name", ["fused", "per node"])
def test_stages_are_heard_late_too_and_by_way_of_connectors(name: str) -> None:
    """A sender that never changes is heard as it is, but for the first updates."""
    fns = [ktg.from_linen(Staged(5)), ktg.from_linen(Staged(5, (8, 12)))]
    nodes = [Node("staged", "a"), Node("staged_wide", "teacher")]
    carried: dict[str, Any] = {"loss": {"kl": 1.0, "features": 3.0}, "connector": "conv"}
    late, now = (
        Graph(nodes, [["through", Edge(delay=delay, **carried)], ["cutoff"] * 2])
        for delay in (4, 0)
    )
    alone = Graph(nodes, [["through", Edge(weight=0.0, **carried)], ["cutoff"] * 2])
    assert late.edge_arrays.delayed == (Delayed(1, 4, changes=False),)
    state = initial(late, fns)
    assert jax.tree.leaves(state.stale) == []
    found = trained(ENGINES[name], late, fns, jax.tree.map(jnp.copy, state))
    # What it would be: alone for four updates, then taught.
    first = ktg.with_delays(state, now.edge_arrays, fns, jnp.zeros((8, 8, 8, 1)))
    first = trained(ENGINES[name], alone, fns, first, 4)
    wanted = trained(ENGINES[name], now, fns, jax.tree.map(jnp.asarray, first), 3)
    chex.assert_trees_all_close(found.params[0], wanted.params[0], rtol=1e-4, atol=1e-5)


def test_metrics_count_what_is_said_late_as_the_senders() -> None:
    fns = [LINEAR] * 2
    graph = Graph(["linear"] * 2, [["through", Edge(delay=1)], ["cutoff", "through"]])
    state, edges = initial(graph, fns), graph.edge_arrays
    images = jnp.asarray(IMAGES[:8] / 255, jnp.float32)
    how: dict[str, Any] = {"node_fns": fns, "optimizer": OPTIMIZER, "ahead": {1: images}}
    losses = []
    for k in (1, 2):
        state, metrics = ktg.train_step(state, images, jnp.asarray(LABELS[:8]), edges, k / 2, **how)
        assert metrics["edge_losses"].shape == (2, 2)
        assert metrics["loss"].shape == metrics["accuracy"].shape == (2,)
        losses.append(float(metrics["edge_losses"][0, 1]))
    assert losses[0] == 0 < losses[1]
    np.testing.assert_allclose(metrics["loss"], metrics["edge_losses"].sum(1), rtol=1e-6)


def test_a_checkpoint_keeps_what_was_said(tmp_path: Path) -> None:
    state = trained(ENGINES["per node"], GRAPH, [LINEAR] * 3, initial(GRAPH, [LINEAR] * 3), 4)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.stale))
    names = ["a", "b", "mean"]
    with Checkpoints(tmp_path / "kept") as kept:
        kept.save(1, state, names, None)
        kept.wait()
        again = kept.restore(initial(GRAPH, [LINEAR] * 3), names, 1)
    chex.assert_trees_all_equal(jax.device_get(again), state)
    whole = trained(ENGINES["per node"], GRAPH, [LINEAR] * 3, initial(GRAPH, [LINEAR] * 3))
    resumed = trained(ENGINES["per node"], GRAPH, [LINEAR] * 3, again, 3)
    chex.assert_trees_all_equal(resumed, whole)


# --- the description


def test_a_delay_is_part_of_the_graph_and_of_its_json() -> None:
    graph = Graph(["cnn"] * 2, [["through", Edge(delay=50)], ["through", "through"]])
    assert '{"gate": "through", "loss": "kl", "weight": 1.0, "delay": 50}' not in graph.to_json()
    assert '"delay": 50' in graph.to_json()
    assert Graph.from_json(graph.to_json()) == graph
    assert graph.edges[0][1].says == "kl, 50 updates late"
    now = Graph(["cnn"] * 2, [["through", "through"], ["through", "through"]])
    assert "delay" not in now.to_json()
    assert not graph.equivalent(now)
    assert graph.canonical().edges[0][1].delay == 50
    json = '{"nodes": [{"model": "cnn"}, {"model": "cnn"}], "gates": [["through", %s], %s]}'
    edge, row = '{"gate": "linear", "delay": 3}', '["cutoff", "through"]'
    assert Graph.from_json(json % (edge, row)).edges[0][1] == Edge("linear", delay=3)


def test_teachers_that_are_heard_at_different_times_are_not_one() -> None:
    nodes = [Node("cnn"), Node("cnn", weights="w"), Node("cnn", weights="w")]
    rows = [["cutoff"] * 3] * 2
    both = Graph(nodes, [["through", "through", Edge(delay=2)], *rows])
    twice = Graph(nodes, [["through", "through", "through"], *rows])
    assert len(both.canonical().nodes) == 3
    assert len(twice.canonical().nodes) == 2


@pytest.mark.parametrize(
    ("delay", "message"),
    [
        (-1, r"gates\[0\]\[1\].delay: got -1; allowed: a whole number of updates from 0 to 10,000"),
        (10_001, r"gates\[0\]\[1\].delay: got 10001; allowed: a whole number"),
        (1.5, r"gates\[0\]\[1\].delay: got 1.5; allowed: a whole number"),
        (True, r"gates\[0\]\[1\].delay: got True; allowed: a whole number"),
        ("2", r"gates\[0\]\[1\].delay: got '2'; allowed: a whole number"),
    ],
)
def test_bad_delays_are_refused(delay: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Graph(["cnn"] * 2, [["through", {"gate": "through", "delay": delay}], ["through"] * 2])


def test_labels_and_ensembles_are_not_heard_late() -> None:
    with pytest.raises(InputError, match=r"gates\[0\]\[0\].delay: got 2; allowed: 0: a label"):
        Graph(["cnn"], [[{"gate": "through", "delay": 2}]])
    nodes = [Node("cnn", "a"), Node("cnn", "b"), Node(name="both", ensemble=("a", "b"))]
    rows = [["through", "through", Edge(delay=1)], ["through"] * 3, ["cutoff"] * 3]
    with pytest.raises(InputError, match=r"gates\[0\]\[2\].delay: got 1; allowed: 0: node both"):
        Graph(nodes, rows)


def test_a_step_without_room_or_images_says_so() -> None:
    graph = Graph(["linear"] * 2, [["through", Edge(delay=2)], ["through", "through"]])
    images, labels = jnp.zeros((8, 8, 8, 1)), jnp.zeros(8, jnp.int32)
    how: dict[str, Any] = {"node_fns": [LINEAR] * 2, "optimizer": OPTIMIZER}
    bare = ktg.init_state(graph, [LINEAR] * 2, OPTIMIZER, jax.random.key(0), images)
    with pytest.raises(InputError, match="stale: got 0; allowed: room for 1 stale senders, as ktg"):
        ktg.train_step(bare, images, labels, graph.edge_arrays, 1.0, ahead={2: images}, **how)
    state = ktg.with_delays(bare, graph.edge_arrays, [LINEAR] * 2, images)
    for ahead in (None, {1: images}):
        with pytest.raises(InputError, match=r"ahead: got \[.*\]; allowed: .* ahead: \[2\]"):
            ktg.train_step(state, images, labels, graph.edge_arrays, 1.0, ahead=ahead, **how)
