"""Canonical graphs: what makes no difference to the target, and what does."""

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import GATES, Graph, Node
from ktg_jax.graph.canonical import canonical_order

T, C, L, R = "through", "cutoff", "linear", "correct"


def make(nodes: Any, gates: Any, temperature: float = 1.0) -> Graph:
    return Graph(nodes, gates, temperature)


def random_graph(rng: np.random.Generator) -> Graph:
    """1 to 6 nodes of few models, weights and gates, so that many look the same."""
    n = int(rng.integers(1, 7))
    share_cut = rng.uniform(0.0, 0.8)
    gates = rng.choice(GATES[: int(rng.integers(2, 6))], size=(n, n)).astype(object)
    gates[rng.random((n, n)) < share_cut] = C
    gates[0, int(rng.integers(n))] = T
    nodes = [
        Node(
            str(rng.choice(["cnn", "resnet8"])),
            weights=str(rng.choice(["runs/a", "runs/b"])) if rng.random() < 0.2 else None,
        )
        for _ in range(n)
    ]
    return make(nodes, gates, float(rng.choice([1.0, 4.0])))


def renumbered(graph: Graph, order: Any) -> Graph:
    """The same graph with its nodes in this order, which begins with the target."""
    gates = np.array(graph.gates, object)[np.ix_(order, order)]
    return make([graph.nodes[i] for i in order], gates, graph.temperature)


def with_label_edges_swapped(graph: Graph, rng: np.random.Generator) -> Graph:
    """`correct` for `through` on some label edges, and the other way round."""
    gates = np.array(graph.gates, object)
    for i in range(len(gates)):
        if gates[i, i] in (T, R) and rng.random() < 0.5:
            gates[i, i] = R if gates[i, i] == T else T
    return make(graph.nodes, gates, graph.temperature)


def with_idle_nodes(graph: Graph, rng: np.random.Generator) -> Graph:
    """With one to three more nodes, which no node of the graph hears."""
    n, more = len(graph.nodes), int(rng.integers(1, 4))
    gates = rng.choice(GATES, size=(n + more, n + more)).astype(object)
    gates[:n, :n] = graph.gates
    gates[:n, n:] = C
    idle = [Node(str(rng.choice(["cnn", "resnet8"])), f"idle{i}") for i in range(more)]
    return make([*graph.nodes, *idle], gates, graph.temperature)


def renamed(graph: Graph) -> Graph:
    nodes = [dataclasses.replace(node, name=f"x{i}") for i, node in enumerate(graph.nodes)]
    return make(nodes, graph.gates, graph.temperature)


def is_same_by_trying_all(a: Graph, b: Graph) -> bool:
    """Whether a numbering of `a` is `b`, by trying them all; both are pruned first.

    Frozen nodes of one model and weights, of which one may stand for several, are for other tests.
    """

    def parts(graph: Graph) -> tuple[Any, ...]:
        gates = np.array(graph.gates, object)
        gates[np.diag(np.diagonal(gates) == R)] = T
        temperature = graph.temperature if len(graph.nodes) > 1 else None
        return [(n.model, n.weights) for n in graph.nodes], gates.tolist(), temperature

    a, b = a.pruned(), b.pruned()
    orders = itertools.permutations(range(1, len(a.nodes)))
    return any(parts(renumbered(a, (0, *order))) == parts(b) for order in orders)


def without_twins(graph: Graph) -> Graph:
    """The graph, its frozen nodes' models made different."""
    nodes = [
        dataclasses.replace(node, weights=f"runs/{i}") if i in graph.frozen else node
        for i, node in enumerate(graph.nodes)
    ]
    return make(nodes, graph.gates, graph.temperature)


def test_a_canonical_graph_by_hand() -> None:
    graph = make(
        [Node("cnn", "student"), Node("wrn10_2", "lost"), Node("resnet8", "b"), Node("cnn", "a")],
        [[R, C, R, L], [T, T, T, T], [C, C, R, C], [C, C, C, C]],
        4.0,
    )
    # Node 1 teaches nobody. Of the others cnn comes before resnet8.
    assert graph.canonical() == make(
        [Node("cnn", "node0"), Node("cnn", "node1"), Node("resnet8", "node2")],
        [[T, L, R], [C, C, C], [C, C, T]],
        4.0,
    )


@pytest.mark.slow
def test_equivalent_graphs_have_one_canonical_graph() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        graph = without_twins(random_graph(rng))
        canonical = graph.canonical()
        assert canonical.canonical() == canonical
        assert Graph.from_json(canonical.to_json()) == canonical
        assert is_same_by_trying_all(canonical, graph)
        order = [0, *(1 + rng.permutation(len(graph.nodes) - 1))]
        for other in (
            renumbered(graph, order),
            with_label_edges_swapped(graph, rng),
            with_idle_nodes(graph, rng),
            renamed(graph),
            renumbered(with_label_edges_swapped(graph, rng), order).pruned(),
        ):
            assert other.canonical() == canonical
            assert graph.equivalent(other)
            assert other.equivalent(graph)


def test_equivalence_is_what_trying_all_numberings_finds() -> None:
    rng = np.random.default_rng(1)
    found = {True: 0, False: 0}
    for _ in range(300):
        graph = without_twins(random_graph(rng))
        gates = np.array(graph.gates, object)
        t, s = rng.integers(len(gates), size=2)
        gates[t, s] = rng.choice([L, R])
        gates[0, 0] = T
        order = [0, *(1 + rng.permutation(len(gates) - 1))]
        other = renumbered(make(graph.nodes, gates, graph.temperature), order)
        expected = is_same_by_trying_all(graph, other)
        assert graph.equivalent(other) == expected
        found[expected] += 1
    assert min(found.values()) > 50


def rings(*sizes: int) -> Graph:
    """A target that hears all others; they form rings, in which each hears the next."""
    n = 1 + sum(sizes)
    gates = np.full((n, n), C, object)
    gates[0] = T
    first = 1
    for size in sizes:
        for i in range(size):
            gates[first + i, first + (i + 1) % size] = T
        first += size
    return make(["cnn"] * n, gates)


def edit(graph: Graph, gate: tuple[int, int, str]) -> Graph:
    receiver, sender, name = gate
    gates = np.array(graph.gates, object)
    gates[receiver, sender] = name
    return make(graph.nodes, gates, graph.temperature)


@pytest.mark.parametrize(
    "gate",
    [(0, 1, R), (0, 1, C), (1, 1, L), (1, 2, "negative_linear"), (2, 0, C), (0, 0, L)],
    ids=str,
)
def test_other_gates_make_another_graph(gate: tuple[int, int, str]) -> None:
    graph = ktg.graphs.mutual(["cnn", "resnet8", "wrn10_2"])
    assert not graph.equivalent(edit(graph, gate))


def test_direction_matters() -> None:
    hears_one = make(["cnn"] * 3, [[T, T, C], [C, T, T], [C, C, T]])
    other_way = make(["cnn"] * 3, [[T, T, C], [C, T, C], [C, T, T]])
    assert not hears_one.equivalent(other_way)
    assert len(other_way.canonical().nodes) == 2


def test_models_weights_and_temperature_matter() -> None:
    graph = ktg.graphs.mutual(["cnn", Node("cnn", "a", "runs/a"), Node("cnn", "b")], 2.0)
    nodes = graph.nodes
    assert graph.equivalent(renumbered(graph, [0, 2, 1]))
    for others in (
        (Node("resnet8"), *nodes[1:]),
        (*nodes[:2], Node("resnet8", "b")),
        (nodes[0], Node("cnn", "a", "runs/b"), nodes[2]),
        (nodes[0], Node("cnn", "a"), nodes[2]),
        (Node("cnn", "t", "runs/a"), *nodes[1:]),
    ):
        assert not graph.equivalent(make(others, graph.gates, 2.0))
    assert not graph.equivalent(make(nodes, graph.gates, 3.0))


def test_which_of_two_nodes_has_the_weights_matters_where_they_differ() -> None:
    gates = [[T, T, L], [C, T, C], [C, C, T]]
    first = make(["cnn", Node("cnn", "a", "runs/a"), Node("cnn", "b")], gates)
    second = make(["cnn", Node("cnn", "a"), Node("cnn", "b", "runs/a")], gates)
    assert not first.equivalent(second)
    assert first.equivalent(renumbered(first, [0, 2, 1]))


def test_no_weights_are_not_the_same_as_empty_ones() -> None:
    gates = [[T, T, L], [C, T, C], [C, C, T]]
    first = make(["cnn", Node("cnn", "a", ""), Node("cnn", "b")], gates)
    second = make(["cnn", Node("cnn", "a"), Node("cnn", "b", "")], gates)
    assert not first.equivalent(second)
    assert first.equivalent(renumbered(first, [0, 2, 1]))


def test_a_frozen_teacher_is_not_one_that_learns() -> None:
    frozen = ktg.graphs.distillation("cnn", "resnet8")
    learning = make(["cnn", "resnet8"], [[T, T], [C, T]])
    assert not frozen.equivalent(learning)
    assert frozen.canonical().frozen == (1,)


def test_the_temperature_of_a_target_alone_is_none() -> None:
    warm = make(["cnn", "resnet8"], [[T, C], [T, T]], 4.0)
    assert warm.equivalent(ktg.graphs.independent(["cnn"]))
    assert warm.canonical().temperature == 1.0


@pytest.mark.parametrize("loss", [{"kl": 3.0}, "attention", {"kl": 1.0, "features": 3.0}])
def test_what_edges_carry_matters_where_something_is_transferred(loss: Any) -> None:
    pair = make(["cnn", "resnet8"], [[T, L], [C, T]], 4.0)
    other = pair.carrying(loss)
    assert not pair.equivalent(other)
    canonical = other.canonical()
    assert canonical.edges[0][1].losses == other.edges[0][1].losses
    assert canonical.canonical() == canonical
    assert other.equivalent(renamed(pair).carrying(loss))
    # A target that hears only its label, whatever goes on beside it.
    alone = make(["cnn", "resnet8"], [[T, C], [T, T]])
    assert alone.carrying(loss).canonical() == ktg.graphs.independent(["cnn"]).canonical()


def test_only_the_label_makes_correct_through() -> None:
    graph = ktg.graphs.mutual(["cnn", "cnn"])
    assert not graph.equivalent(edit(graph, (0, 1, R)))
    assert graph.equivalent(edit(graph, (1, 1, R)))


def test_a_model_that_no_name_can_be_made_of_has_a_canonical_graph() -> None:
    graph = make([Node("my model", "a")], [[L]])
    assert graph.canonical() == make([Node("my model", "node0")], [[L]])


@pytest.mark.parametrize(
    "graph",
    [
        ktg.graphs.mutual(["cnn"] * 12),
        ktg.graphs.distillation("cnn", ["cnn"] * 11),
        rings(11),
    ],
    ids=["mutual", "distillation", "ring"],
)
def test_graphs_of_many_nodes_that_all_look_the_same_take_no_time(graph: Graph) -> None:
    began = time.process_time()
    canonical = graph.canonical()
    rng = np.random.default_rng(0)
    assert renumbered(graph, [0, *(1 + rng.permutation(11))]).canonical() == canonical
    assert time.process_time() - began < 5.0  # all numberings, 40 million, would take an hour


def test_what_only_the_whole_graph_tells_apart() -> None:
    # Every node hears one of its kind and is heard by one, in a ring of three as in one of four.
    rng = np.random.default_rng(2)
    assert not rings(6).equivalent(rings(3, 3))
    assert not rings(7).equivalent(rings(3, 4))
    for graph in (rings(6), rings(3, 3), rings(2, 4), rings(3, 4)):
        others = len(graph.nodes) - 1
        for _ in range(10):
            assert graph.equivalent(renumbered(graph, [0, *(1 + rng.permutation(others))]))


def test_the_canonical_order_sorts_kinds() -> None:
    rng = np.random.default_rng(3)
    kinds = np.array(list("aabbbc"))
    edges = rng.integers(0, 2, size=(6, 6))
    seen = set()
    for _ in range(50):
        shuffle = rng.permutation(6)
        shuffled = edges[np.ix_(shuffle, shuffle)]
        order = list(canonical_order([str(kind) for kind in kinds[shuffle]], shuffled.tolist()))
        assert "".join(kinds[shuffle][order]) == "aabbbc"
        seen.add(shuffled[np.ix_(order, order)].tobytes())
    assert len(seen) == 1
