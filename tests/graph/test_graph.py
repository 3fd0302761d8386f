import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import Graph, InputError, Node
from ktg_jax.graph.edge import Edge

MIXED = Graph(
    nodes=(Node("resnet32", "target"), Node("wrn28_2", "helper", "runs/a:helper"), Node("cnn")),
    gates=(
        ("through", "correct", "linear"),
        ("negative_linear", "through", "cutoff"),
        ("cutoff", "cutoff", "cutoff"),
    ),
    temperature=2.5,
)


def make(nodes: Any, gates: Any, temperature: Any = 1.0) -> Graph:
    """A graph of anything: `Graph` normalises, or refuses, what its fields' types exclude."""
    return Graph(nodes, gates, temperature)


def node(*fields: Any, **named_fields: Any) -> Node:
    return Node(*fields, **named_fields)


def graph_of(edges: np.ndarray) -> Graph:
    """A graph of N nodes with through gates where `edges` [receiver, sender] is true."""
    gates = [["through" if edge else "cutoff" for edge in row] for row in edges]
    return make([f"node{i}" for i in range(len(edges))], gates)


def test_codes_are_positions_in_gates() -> None:
    codes = MIXED.gate_codes
    assert codes.dtype == np.int32
    assert codes.tolist() == [[0, 3, 2], [4, 0, 1], [1, 1, 1]]


def test_a_node_without_a_name_is_named_by_model_and_position() -> None:
    assert [node.name for node in MIXED.nodes] == ["target", "helper", "cnn-2"]


def test_strings_are_models() -> None:
    graph = make(("cnn", "resnet8"), (("through", "cutoff"), ("cutoff", "through")))
    assert graph.nodes == (Node("cnn", "cnn-0"), Node("resnet8", "resnet8-1"))


def test_frozen_nodes_are_those_that_receive_nothing() -> None:
    assert MIXED.frozen == (2,)
    assert graph_of(np.eye(3)).frozen == ()
    assert graph_of(np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]])).frozen == (1, 2)


def test_graphs_are_equal_and_hash_equal_by_content() -> None:
    lists = make(
        [Node("cnn", "cnn-0"), "cnn"],
        [["through", "linear"], np.array(["cutoff", "correct"])],
        temperature=1,
    )
    tuples = Graph(
        (Node("cnn"), Node("cnn", "cnn-1")), (("through", "linear"), ("cutoff", "correct")), 1.0
    )
    assert lists == tuples
    assert hash(lists) == hash(tuples)
    others = [
        dataclasses.replace(tuples, temperature=2.0),
        tuples.carrying({"kl": 2.0}),
        tuples.carrying("attention"),
        tuples.carrying({"kl": 1.0, "features": 2.0}),
    ]
    assert len({lists, tuples, *others}) == 5


def test_a_graph_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIXED.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIXED.nodes[0].name = "other"  # type: ignore[misc]


def test_a_graph_does_not_share_memory_with_what_it_was_made_of_or_gives() -> None:
    nodes, gates = ["cnn", "cnn"], [["through", "cutoff"], ["cutoff", "through"]]
    graph = make(nodes, gates)
    nodes.append("cnn")
    gates[0][0] = "cutoff"
    graph.gate_codes[:] = 1
    assert graph == ktg.graphs.independent(["cnn", "cnn"])


CARRYING = MIXED.carrying({"kl": 0.5, "attention": 1e3, "features": 0.1})


@pytest.mark.parametrize("graph", [MIXED, make(["cnn"], (("correct",),)), CARRYING])
def test_json_and_files_bring_the_same_graph_back(graph: Graph, tmp_path: Path) -> None:
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph.from_json(json.loads(graph.to_json())) == graph
    graph.save(tmp_path / "graph.json")
    assert Graph.load(tmp_path / "graph.json") == graph
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


def test_json_has_these_fields() -> None:
    assert json.loads(MIXED.to_json()) == {
        "nodes": [
            {"name": "target", "model": "resnet32", "weights": None},
            {"name": "helper", "model": "wrn28_2", "weights": "runs/a:helper"},
            {"name": "cnn-2", "model": "cnn", "weights": None},
        ],
        "gates": [
            ["through", "correct", "linear"],
            ["negative_linear", "through", "cutoff"],
            ["cutoff", "cutoff", "cutoff"],
        ],
        "temperature": 2.5,
    }


def test_names_and_temperature_may_be_left_out_of_json() -> None:
    graph = Graph.from_json('{"nodes": [{"model": "cnn"}], "gates": [["through"]]}')
    assert graph == Graph((Node("cnn", "cnn-0"),), (("through",),), 1.0)


def test_a_failing_write_leaves_the_old_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "graph.json"
    MIXED.save(path)

    def half_a_write(self: Path, text: str, **kwargs: Any) -> int:
        with self.open("w", **kwargs) as file:
            file.write(text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half_a_write)
    with pytest.raises(OSError, match="disk full"):
        ktg.graphs.mutual(["cnn"]).save(path)
    assert Graph.load(path) == MIXED
    assert os.listdir(tmp_path) == ["graph.json"]


ONE = ["cnn"]
GATE_NAMES = "through, cutoff, linear, correct, negative_linear"


@pytest.mark.parametrize(
    ("nodes", "gates", "temperature", "field", "value", "allowed"),
    [
        ([], [], 1.0, "nodes", "[]", "at least one node"),
        ("cnn", [["through"]], 1.0, "nodes", "'cnn'", "a sequence of nodes"),
        (3, [["through"]], 1.0, "nodes", "3", "a sequence of nodes"),
        ([7], [["through"]], 1.0, "nodes[0]", "7", "a Node or a model's name"),
        ([""], [["through"]], 1.0, "nodes[0].model", "''", "a model's name"),
        ([node(5)], [["through"]], 1.0, "nodes[0].model", "5", "a model's name"),
        ([Node("cnn", "a b")], [["through"]], 1.0, "nodes[0].name", "'a b'", "letters, digits"),
        ([Node("cnn", "")], [["through"]], 1.0, "nodes[0].name", "''", "letters, digits"),
        ([Node("cnn", "a\n")], [["through"]], 1.0, "nodes[0].name", "'a\\n'", "letters, digits"),
        ([node("cnn", 1)], [["through"]], 1.0, "nodes[0].name", "1", "letters"),
        (
            [Node("cnn", "a"), Node("resnet8", "a")],
            [["through"] * 2] * 2,
            1.0,
            "nodes[1].name",
            "'a'",
            "a name that no other node has",
        ),
        (
            [Node("cnn", "cnn-1"), "cnn"],
            [["through"] * 2] * 2,
            1.0,
            "nodes[1].name",
            "'cnn-1'",
            "a name that no other node has",
        ),
        ([node("cnn", weights=1)], [["through"]], 1.0, "nodes[0].weights", "1", "a path"),
        (ONE, [], 1.0, "gates", "[]", "1 rows of 1 gates"),
        (ONE, None, 1.0, "gates", "None", "1 rows of 1 gates"),
        (ONE, "t", 1.0, "gates", "'t'", "1 rows of 1 gates"),
        (ONE, ["t"], 1.0, "gates[0]", "'t'", "1 rows of 1 gates"),
        (ONE, [["through", "through"]], 1.0, "gates[0]", "['through', 'through']", "1 rows of 1"),
        (["cnn"] * 2, [["through"] * 2], 1.0, "gates", "[['through', 'through']]", "2 rows of 2"),
        (ONE, [["open"]], 1.0, "gates[0][0]", "'open'", GATE_NAMES),
        (
            ["cnn"] * 2,
            [["through"] * 2, ["through", "Through"]],
            1.0,
            "gates[1][1]",
            "'Through'",
            GATE_NAMES,
        ),
        (ONE, [[0]], 1.0, "gates[0][0]", "0", GATE_NAMES),
        (ONE, [["cutoff"]], 1.0, "gates[0]", "['cutoff']", "that is not cutoff"),
        (ONE, [["through"]], 0.0, "temperature", "0.0", "a finite number above 0"),
        (ONE, [["through"]], -1, "temperature", "-1", "a finite number above 0"),
        (ONE, [["through"]], float("nan"), "temperature", "nan", "a finite number above 0"),
        (ONE, [["through"]], float("inf"), "temperature", "inf", "a finite number above 0"),
        (ONE, [["through"]], "4", "temperature", "'4'", "a finite number above 0"),
        (ONE, [["through"]], True, "temperature", "True", "a finite number above 0"),
        (ONE, [["through"]], None, "temperature", "None", "a finite number above 0"),
    ],
)
def test_a_bad_graph_is_refused_by_field_value_and_what_is_allowed(
    nodes: Any, gates: Any, temperature: Any, field: str, value: str, allowed: str
) -> None:
    with pytest.raises(InputError) as error:
        make(nodes, gates, temperature)
    message = str(error.value)
    assert message.startswith(f"{field}: got {value}; allowed: ")
    assert allowed in message
    assert "\n" not in message


OPTIONAL = "(and temperature)"


@pytest.mark.parametrize(
    ("text", "field", "allowed"),
    [
        ("{", "graph", "JSON"),
        ("", "graph", "JSON"),
        ("[" * 100, "graph", "JSON"),
        ("[]", "graph", f"an object with gates, nodes {OPTIONAL}"),
        ("null", "graph", f"an object with gates, nodes {OPTIONAL}"),
        ('{"nodes": []}', "graph.gates", f"an object with gates, nodes {OPTIONAL}"),
        ('{"gates": []}', "graph.nodes", f"an object with gates, nodes {OPTIONAL}"),
        ('{"nodes": [], "gates": [], "gate": 1}', "graph.gate", "an object with gates, nodes"),
        ('{"nodes": "cnn", "gates": []}', "nodes", "a list of nodes"),
        ('{"nodes": ["cnn"], "gates": []}', "nodes[0]", "an object with model"),
        ('{"nodes": [{"name": "a"}], "gates": []}', "nodes[0].model", "an object with model"),
        (
            '{"nodes": [{"model": "cnn", "width": 2}], "gates": []}',
            "nodes[0].width",
            "an object with model (and average, classes, clip, ensemble, input, learning_rate, ",
        ),
        ('{"nodes": [{"model": "cnn"}], "gates": [["open"]]}', "gates[0][0]", GATE_NAMES),
        (
            '{"nodes": [{"model": "cnn"}], "gates": [["through"]], "temperature": NaN}',
            "temperature",
            "a finite number above 0",
        ),
    ],
)
def test_bad_json_is_refused_from_text_and_from_a_file(
    text: str, field: str, allowed: str, tmp_path: Path
) -> None:
    path = tmp_path / "graph.json"
    path.write_text(text)
    for read in (lambda: Graph.from_json(text), lambda: Graph.load(path)):
        with pytest.raises(InputError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{field}: got ")
        assert allowed in message.partition("; allowed: ")[2]
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize("name", ["missing.json", "folder", "binary.json"])
def test_a_file_that_cannot_be_read_is_bad_input(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"graph: got '.*'; allowed: a readable JSON file"):
        Graph.load(tmp_path / name)


def test_needed_nodes_follow_edges_from_sender_to_receiver() -> None:
    # 0 <- 1 <- 2, and 0 -> 3: what 0 sends to does not matter to it.
    chain = graph_of(np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 1]]))
    assert chain.needed_nodes() == (0, 1, 2)
    assert chain.needed_nodes([1]) == (1, 2)
    assert chain.needed_nodes([2]) == (2,)
    assert chain.needed_nodes([3]) == (0, 1, 2, 3)
    assert chain.needed_nodes([2, 0]) == (0, 1, 2)
    assert chain.needed_nodes([]) == ()


def test_needed_nodes_end_in_a_cycle() -> None:
    cycle = graph_of(np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1]]))
    assert cycle.needed_nodes() == (0, 1)


@pytest.mark.parametrize("root", [-1, 2, "cnn"])
def test_a_root_that_is_no_node_is_refused(root: Any) -> None:
    graph = ktg.graphs.mutual(["cnn", "cnn"])
    with pytest.raises(InputError, match=r"roots: got .*; allowed: node indices 0 to 1"):
        graph.needed_nodes([root])


def test_needed_nodes_are_the_transitive_closure_of_random_graphs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 6))
        edges = rng.random((n, n)) < rng.uniform(0.1, 0.6)
        edges[0, 0] = True
        closure = np.linalg.matrix_power(np.eye(n) + edges, n) > 0
        graph = graph_of(edges)
        for root in range(n):
            assert graph.needed_nodes([root]) == tuple(np.flatnonzero(closure[root]))
        roots = np.flatnonzero(rng.random(n) < 0.5)
        expected = np.flatnonzero(closure[[0, *roots]].any(axis=0))
        pruned = graph.pruned(roots)
        assert pruned.nodes == tuple(graph.nodes[i] for i in expected)
        np.testing.assert_array_equal(
            pruned.gate_codes, graph.gate_codes[np.ix_(expected, expected)]
        )


def test_pruning_keeps_names_weights_gates_and_temperature() -> None:
    gates = np.full((4, 4), "cutoff", object)
    gates[0, 0], gates[0, 2], gates[2, 2], gates[1, 0] = "linear", "correct", "through", "through"
    nodes = [Node("cnn"), Node("cnn", "b"), Node("resnet8", weights="runs/c"), Node("cnn")]
    pruned = make(nodes, gates, 3.0).pruned()
    assert pruned == Graph(
        (Node("cnn", "cnn-0"), Node("resnet8", "resnet8-2", "runs/c")),
        (("linear", "correct"), ("cutoff", "through")),
        3.0,
    )


def test_pruning_keeps_what_edges_carry() -> None:
    edges = CARRYING.edges
    alone = (edges[0][0], edges[0][1], Edge("cutoff")), *edges[1:]
    pruned = dataclasses.replace(CARRYING, edges=alone).pruned()
    assert len(pruned.nodes) == 2
    assert pruned.edges == tuple(row[:2] for row in alone[:2])


def test_pruning_keeps_frozen_teachers_and_what_is_needed_whole() -> None:
    kd = ktg.graphs.distillation("resnet8", ["resnet32", "wrn16_2"], 4.0)
    assert kd.pruned() == kd
    assert kd.pruned().frozen == (1, 2)
    assert ktg.graphs.independent(["cnn", "resnet8"]).pruned().nodes == (Node("cnn", "cnn-0"),)


T, C = "through", "cutoff"
MODELS = ["resnet8", "resnet20", "wrn10_2"]


@pytest.mark.parametrize(
    ("graph", "gates"),
    [
        (ktg.graphs.independent(MODELS), ((T, C, C), (C, T, C), (C, C, T))),
        (ktg.graphs.mutual(MODELS, 2.0), ((T, T, T), (T, T, T), (T, T, T))),
        (ktg.graphs.chain(MODELS, 2.0), ((T, T, C), (C, T, T), (C, C, T))),
        (
            ktg.graphs.distillation(MODELS[0], MODELS[1:], 2.0),
            ((T, T, T), (C, C, C), (C, C, C)),
        ),
    ],
    ids=["independent", "mutual", "chain", "distillation"],
)
def test_named_methods_are_these_graphs(graph: Graph, gates: tuple[tuple[str, ...], ...]) -> None:
    assert graph.gates == gates
    assert [node.model for node in graph.nodes] == MODELS
    assert graph.temperature == (2.0 if gates[0][1] == T else 1.0)


def test_distillation_takes_one_teacher_with_its_weights() -> None:
    teacher = Node("resnet32", "teacher", "runs/teacher")
    graph = ktg.graphs.distillation(Node("resnet8", "student"), teacher)
    assert graph.nodes == (Node("resnet8", "student"), teacher)
    assert graph.gates == ((T, T), (C, C))


def test_named_methods_refuse_what_is_no_list_of_models() -> None:
    with pytest.raises(InputError, match="models: got 'resnet8'; allowed: a sequence of nodes"):
        ktg.graphs.mutual("resnet8")
    with pytest.raises(InputError, match=r"nodes: got .*; allowed: at least one node"):
        ktg.graphs.independent([])
    with pytest.raises(InputError, match=r"teachers: got \[\]; allowed: at least one node"):
        ktg.graphs.distillation("resnet8", [])
