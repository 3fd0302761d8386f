"""Edges: what they carry, how they are written, and what their losses and gates come to."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import Edge, Graph, gates, named_losses
from ktg_jax.errors import InputError

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.standard_normal((2, 6, 5)), jnp.float32)
LABELS = jnp.arange(6) % 5
THROUGH = jnp.zeros((2, 2), int)


@pytest.fixture
def registries() -> Iterator[None]:
    """Takes back what a test registers."""
    registries: list[dict[str, Any]] = [gates._registered, named_losses._registered]
    kept = [dict(registry) for registry in registries]
    yield
    for registry, former in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(former)


# --- how they are written

WRITTEN = [
    ("linear", Edge("linear")),
    ({"gate": "linear", "loss": "reverse_kl"}, Edge("linear", "reverse_kl")),
    ({"loss": {"kl": 1, "attention": 1000}}, Edge("through", {"kl": 1.0, "attention": 1000.0})),
    ({"gate": "correct", "weight": 0.5, "temperature": 4}, Edge("correct", "kl", 0.5, 4.0)),
]


@pytest.mark.parametrize(("written", "edge"), WRITTEN)
def test_a_transfer_edge_of_json_is_this_edge_and_reads_back_equal(
    written: Any, edge: Edge
) -> None:
    given = {"nodes": [{"model": "cnn"}] * 2, "gates": [["through", written], ["cutoff"] * 2]}
    graph = Graph.from_json(json.dumps(given))
    assert graph.edges[0][1] == edge
    assert graph.gates[0][1] == edge.gate
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph(["cnn", "cnn"], [["through", edge], ["cutoff", "cutoff"]]) == graph
    assert hash(Graph.from_json(graph.to_json())) == hash(graph)
    is_name = isinstance(json.loads(graph.to_json())["gates"][0][1], str)
    assert is_name == isinstance(written, str)


def test_a_label_edge_carries_the_cross_entropy() -> None:
    graph = Graph(["cnn"], [[Edge("linear", weight=2.0)]])
    assert graph.edges[0][0] == Edge("linear", "cross_entropy", 2.0)
    assert json.loads(graph.to_json())["gates"] == [
        [{"gate": "linear", "loss": "cross_entropy", "weight": 2.0}]
    ]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (["ajar", "cutoff"], "gates[0][0]"),
        ([{"gate": "ajar"}, "cutoff"], "gates[0][0].gate"),
        (["through", {"loss": "kI"}], "gates[0][1].loss"),
        (["through", {"loss": {}}], "gates[0][1].loss"),
        (["through", {"loss": {"kl": -1}}], "gates[0][1].loss.kl"),
        (["through", {"loss": "cross_entropy"}], "gates[0][1].loss"),
        ([{"loss": "reverse_kl"}, "cutoff"], "gates[0][0].loss"),
        (["through", {"weight": float("nan")}], "gates[0][1].weight"),
        (["through", {"weight": True}], "gates[0][1].weight"),
        (["through", {"temperature": 0}], "gates[0][1].temperature"),
        (["through", {"wieght": 1}], "gates[0][1].wieght"),
        (["through", 3], "gates[0][1]"),
    ],
)
def test_a_bad_edge_is_refused_by_its_field(row: Any, field: str) -> None:
    with pytest.raises(InputError) as error:
        Graph(["cnn", "cnn"], [row, ["cutoff", "through"]])
    assert error.value.field == field


def test_a_name_among_the_gates_changes_the_gate_alone() -> None:
    graph = Graph(["cnn", "cnn"], [["through", Edge("linear", "reverse_kl")], ["cutoff"] * 2])
    changes: Any = {"gates": [["linear", "correct"], ["cutoff"] * 2]}
    changed = dataclasses.replace(graph, **changes)
    assert changed.edges[0] == (Edge("linear", "cross_entropy"), Edge("correct", "reverse_kl"))
    assert dataclasses.replace(graph, temperature=4.0).edges == graph.edges


# --- gates as numbers


def test_the_gates_are_these_numbers() -> None:
    assert ktg.gate_coefficients(jnp.array([ktg.GATES.index(g) for g in ktg.GATES])).tolist() == [
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [1, -1, 0, 0],
    ]
    assert np.isnan(ktg.gate_coefficients(jnp.array([-1, 99]))).all()


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_codes_and_their_numbers_give_every_bit_of_the_same_losses(progress: float) -> None:
    codes = jnp.array([[3, 2, 0], [4, 0, 1], [1, 3, 2]])
    logits = jnp.asarray(RNG.standard_normal((3, 6, 5)), jnp.float32)
    losses = jax.jit(ktg.edge_losses)
    expected = losses(logits, LABELS, codes, progress, 2.0)
    found = losses(logits, LABELS, ktg.gate_coefficients(codes), progress, 2.0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_numbers_of_a_gate_are_differentiable() -> None:
    numbers = ktg.gate_coefficients(jnp.array([[0, 2], [1, 0]]))
    kl = ktg.kl_divergence(LOGITS[0], LOGITS[1])
    right = jnp.argmax(LOGITS[1], axis=-1) == LABELS

    def loss(numbers: jax.Array) -> jax.Array:
        return ktg.edge_losses(LOGITS, LABELS, numbers, 0.25)[0, 1]

    by_hand = [kl.mean(), 0.25 * kl.mean(), (right * kl).mean(), 0.25 * (right * kl).mean()]
    gradient = jax.grad(loss)(numbers)
    np.testing.assert_allclose(gradient[0, 1], jnp.stack(by_hand), rtol=1e-5)
    np.testing.assert_array_equal(gradient[1], 0)


# --- losses by name, weights and temperatures of edges


def test_each_edge_has_its_own_losses_weight_and_temperature() -> None:
    edges = [
        ["linear", Edge("through", {"kl": 2, "reverse_kl": 3}, 0.5, 4.0)],
        [Edge("correct"), "through"],
    ]
    graph = Graph(["cnn", "cnn"], edges, temperature=2.0)
    found = ktg.edge_losses(LOGITS, LABELS, graph.edge_arrays, 0.25)
    forward = ktg.kl_divergence(LOGITS[0], LOGITS[1], 4.0).mean()
    backward = ktg.kl_divergence(LOGITS[1], LOGITS[0], 4.0).mean()
    right = jnp.argmax(LOGITS[0], axis=-1) == LABELS
    label = [ktg.cross_entropy(z, LABELS).mean() for z in LOGITS]
    assert graph.losses == ("cross_entropy", "kl", "reverse_kl")
    np.testing.assert_allclose(found[0, 0], 0.25 * label[0], rtol=1e-5)
    np.testing.assert_allclose(found[0, 1], forward + 1.5 * backward, rtol=1e-5)
    np.testing.assert_allclose(
        found[1, 0], (right * ktg.kl_divergence(LOGITS[1], LOGITS[0], 2.0)).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(found[1, 1], label[1], rtol=1e-5)


def test_the_reverse_divergence_is_worked_out_by_hand() -> None:
    receiver, sender = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    found = ktg.reverse_kl_divergence(receiver, sender)
    np.testing.assert_allclose(found, [0.5 * np.log(2) + 0.5 * np.log(2 / 3)], rtol=1e-5)
    gradient = jax.grad(lambda z: ktg.reverse_kl_divergence(receiver, z).sum())(sender)
    np.testing.assert_array_equal(gradient, 0)  # the sender is detached
    chex.assert_numerical_grads(
        lambda z: ktg.reverse_kl_divergence(z, sender, 2.0), (receiver,), 1, atol=1e-2, rtol=1e-2
    )


def test_one_program_serves_all_weights_and_temperatures() -> None:
    traced = []

    @jax.jit
    def compiled(*given: Any) -> jax.Array:
        traced.append(given)
        return ktg.edge_losses(*given)

    for weight, temperature in ((1.0, 1.0), (0.5, 4.0)):
        graph = Graph(
            ["cnn", "cnn"], [["through", Edge(weight=weight)], ["linear"] * 2], temperature
        )
        found = compiled(LOGITS, LABELS, graph.edge_arrays, 0.5)
        expected = weight * ktg.kl_divergence(LOGITS[0], LOGITS[1], temperature).mean()
        np.testing.assert_allclose(found[0, 1], expected, rtol=1e-5)
    assert len(traced) == 1


def test_a_loss_and_a_gate_of_ones_own_train_in_a_graph(registries: None) -> None:
    def logit_distance(receiver: Any, sender: Any, labels: Any, temperature: Any) -> jax.Array:
        return jnp.mean((receiver.logits - sender.logits) ** 2, axis=-1)

    def wrong(progress: Any, receiver_right: Any, *others: Any) -> jax.Array:
        return ~receiver_right

    ktg.register_loss("logit_distance", ktg.per_sample(logit_distance), uses_temperature=False)
    ktg.register_gate("wrong", wrong)
    graph = Graph(["cnn", "cnn"], [["through", Edge("wrong", "logit_distance")], ["cutoff"] * 2])
    assert Graph.from_json(graph.to_json()) == graph
    assert not graph.equivalent(Graph(["cnn", "cnn"], [["through", "linear"], ["cutoff"] * 2]))
    for losses in (ktg.edge_losses, jax.jit(ktg.edge_losses)):
        found = losses(LOGITS, LABELS, graph.edge_arrays, 0.5)
        is_wrong = jnp.argmax(LOGITS[0], axis=-1) != LABELS
        distance = ((LOGITS[0] - LOGITS[1]) ** 2).mean(axis=-1)
        np.testing.assert_allclose(found[0, 1], (is_wrong * distance).mean(), rtol=1e-5)
    half = ("half", (0.5, 0, 0, 0))
    ktg.register_gate(*half)
    with_half = Graph(["cnn", "cnn"], [["through", "half"], ["cutoff"] * 2])
    assert with_half.equivalent(
        Graph(["cnn", "cnn"], [["through", Edge(weight=0.5)], ["cutoff"] * 2])
    )


@pytest.mark.parametrize("name", ["kl", "cross_entropy", "a b", "", 3])
def test_names_of_losses_that_are_taken_or_malformed_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"^name: got "):
        ktg.register_loss(name, ktg.per_sample(lambda *given: jnp.zeros(6)))


@pytest.mark.parametrize("gate", [None, (1, 2, 3), (1, 2, 3, float("nan")), ["a"] * 4])
def test_what_is_no_gate_is_refused(gate: Any) -> None:
    with pytest.raises(InputError, match=r"^gate: got "):
        ktg.register_gate("mine", gate)
    with pytest.raises(InputError, match=r"^name: got 'linear'"):
        ktg.register_gate("linear", (0, 0, 0, 0))


# --- batches of any shape, and masks


@pytest.mark.slow
def test_tokens_are_a_batch_of_two_axes() -> None:
    logits, labels = LOGITS.reshape(2, 2, 3, 5), LABELS.reshape(2, 3)
    codes = jnp.array([[0, 3], [2, 3]])
    found = ktg.edge_losses(logits, labels, codes, 0.25, 2.0)
    np.testing.assert_allclose(found, ktg.edge_losses(LOGITS, LABELS, codes, 0.25, 2.0), rtol=1e-6)
    assert ktg.cross_entropy(logits[0], labels).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_does_not_count_may_hold_anything(shape: tuple[int, ...], junk: float) -> None:
    where = jnp.array([True, True, False, True, False, True])
    codes, kept = jnp.array([[0, 3], [2, 0]]), jnp.flatnonzero(where)
    logits = jnp.where(where[:, None], LOGITS, junk).reshape(2, *shape, 5)
    labels = jnp.where(where, LABELS, -100).reshape(shape)

    def total(logits: jax.Array) -> jax.Array:
        return ktg.graph_loss(logits, labels, codes, 0.25, 2.0, where=where.reshape(shape))

    def of_kept(logits: jax.Array) -> jax.Array:
        return ktg.graph_loss(logits, LABELS[kept], codes, 0.25, 2.0)

    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    expected, on_kept = jax.value_and_grad(of_kept)(LOGITS[:, kept])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    flat = gradient.reshape(2, 6, 5)
    np.testing.assert_allclose(flat[:, kept], on_kept, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(flat[:, ~where], 0)
    _, metrics = ktg.graph_gradients(
        list(logits), labels, codes, 0.25, 2.0, where=where.reshape(shape)
    )
    right = (jnp.argmax(LOGITS, axis=-1) == LABELS)[:, kept].mean(axis=1)
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)


def test_nothing_that_counts_is_no_loss() -> None:
    none = jnp.zeros(6, bool)
    np.testing.assert_array_equal(
        ktg.edge_losses(LOGITS, LABELS, THROUGH, 0.5, where=none), jnp.zeros((2, 2))
    )


# --- graphs that train alike


def teaching(*edges: Edge | str, label: Edge | str = "through") -> Graph:
    """A target that hears frozen copies of one network."""
    n = len(edges) + 1
    nodes = ["cnn", *[ktg.Node("resnet8", f"t{i}", weights="runs/t") for i in range(n - 1)]]
    return Graph(nodes, [[label, *edges], *[["cutoff"] * n] * (n - 1)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (teaching("through", "through"), teaching(Edge(weight=2))),
        (teaching("linear", "negative_linear"), teaching("through")),
        (teaching("linear", "linear", "correct"), teaching("correct", Edge("linear", weight=2))),
        (
            teaching("through", Edge(loss="attention")),
            teaching(Edge(loss={"attention": 1, "kl": 1})),
        ),
        (teaching("through", Edge(weight=0)), teaching("through")),
        (teaching(Edge(weight=0)), ktg.graphs.independent(["cnn"])),
        (teaching(Edge(loss="attention", temperature=4)), teaching(Edge(loss="attention"))),
        (teaching(Edge("linear", {"kl": 2}, 0.5)), teaching("linear")),
        (
            teaching("linear", label=Edge("correct", weight=3)),
            teaching("linear", label=Edge(weight=3)),
        ),
    ],
)
def test_these_are_equivalent(one: Graph, other: Graph) -> None:
    assert one.canonical() == other.canonical()
    assert one.canonical().canonical() == one.canonical()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (teaching("through", "through"), teaching("through")),
        (teaching("linear", "correct"), teaching("linear", "linear")),
        (teaching(Edge(temperature=4)), teaching("through")),
        (teaching(Edge(loss="reverse_kl")), teaching("through")),
        (teaching("linear"), teaching("linear", label=Edge(weight=3))),
    ],
)
def test_these_are_not(one: Graph, other: Graph) -> None:
    assert not one.equivalent(other)


@pytest.mark.slow
def test_equivalent_graphs_have_the_same_loss_for_their_target() -> None:
    teacher, one = (
        jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32),
        teaching("linear", "correct", "negative_linear"),
    )
    other = one.canonical()
    for progress in (0.1, 0.7):
        total = [
            ktg.node_losses(
                jnp.stack([LOGITS[0], *[teacher] * (len(graph.nodes) - 1)]),
                LABELS,
                graph.edge_arrays,
                progress,
            )[0]
            for graph in (one, other)
        ]
        np.testing.assert_allclose(total[0], total[1], rtol=1e-5)
    assert len(other.nodes) == 3  # through and correct are two gates
