"""What images a node wants: how it is said, and what is refused."""

import json
from typing import Any

import pytest

from ktg_jax import Graph, InputError, Node
from ktg_jax.inputs import NAMED, Input, checked_input, input_text, parsed_input, resolved_input

PAIR = [["through", "through"], ["cutoff", "cutoff"]]


def test_a_node_says_its_input_by_a_name_or_by_numbers() -> None:
    numbers = {"mean": [0.5, 0.25, 0], "std": 2, "size": 32}
    nodes = [Node("cnn", input="imagenet"), Node("cnn", weights="w", input=numbers)]
    graph = Graph(nodes, PAIR)
    assert graph.nodes[1].input == Input((0.5, 0.25, 0.0), (2.0,), 32)
    assert Graph.from_json(graph.to_json()) == graph
    written = json.loads(graph.to_json())["nodes"]
    assert written[0]["input"] == "imagenet"
    assert written[1]["input"] == {"mean": [0.5, 0.25, 0.0], "std": [2.0], "size": 32}
    assert "input" not in Node("cnn").to_dict()


def test_frozen_nodes_are_one_network_only_if_they_see_the_same() -> None:
    def graph(first: Any, second: Any) -> Graph:
        teachers = [Node("cnn", weights="w", input=each) for each in (first, second)]
        cut = ["cutoff"] * 3
        return Graph([Node("cnn"), *teachers], [["through"] * 3, cut, cut])

    twice = NAMED["half"]
    assert len(graph("half", twice).canonical().nodes) == 2  # their edges' weights add up
    assert len(graph("half", None).canonical().nodes) == 3
    assert len(graph("data", "half").canonical().nodes) == 3
    assert graph("half", None).equivalent(graph(None, "half"))


def test_texts_are_read_as_they_are_written() -> None:
    for given in ("cifar10", Input((0.1, 0.2), (0.3,), 8)):
        assert parsed_input("input", input_text(given)) == given


def test_the_datas_own_statistics_must_be_known() -> None:
    of_data = Input((0.1,), (0.2,))
    assert resolved_input("data", of_data) is of_data
    assert resolved_input("half", of_data) == NAMED["half"]
    with pytest.raises(InputError, match=r"input: got 'data'; allowed: imagenet, .* no training"):
        resolved_input("data")


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        ("imagenets", "input", "imagenet, cifar10, .* did you mean 'imagenet'"),
        (3, "input", "an object with"),
        ({"means": [0.5]}, "input.means", "did you mean 'mean'"),
        ({"mean": []}, "input.mean", "a finite number"),
        ({"mean": "0.5"}, "input.mean", "a finite number"),
        ({"mean": [float("nan")]}, "input.mean", "a finite number"),
        ({"mean": [True]}, "input.mean", "a finite number"),
        ({"std": [0.5, 0]}, "input.std", "numbers above 0"),
        ({"std": -1}, "input.std", "numbers above 0"),
        ({"mean": [0.1, 0.2], "std": [1, 1, 1]}, "input.std", "2 numbers, as many as means"),
        ({"size": 0}, "input.size", "1 to 4,096"),
        ({"size": 4097}, "input.size", "1 to 4,096"),
        ({"size": 32.0}, "input.size", "a whole number"),
    ],
)
def test_a_bad_input_is_refused(given: Any, field: str, allowed: str) -> None:
    with pytest.raises(InputError, match=allowed) as caught:
        checked_input("input", given)
    assert caught.value.field == field
    with pytest.raises(InputError) as caught:
        Graph([Node("cnn", input=given), "cnn"], [["through"] * 2] * 2)
    assert caught.value.field == f"nodes[0].{field}"


# --- recorded nodes


def test_a_recorded_node_is_its_outputs_alone() -> None:
    graph = Graph([Node("cnn"), Node(name="teacher", outputs="there")], PAIR)
    assert json.loads(graph.to_json())["nodes"][1] == {"name": "teacher", "outputs": "there"}
    assert Graph.from_json(graph.to_json()) == graph
    assert graph.nodes[1].model == "recorded"
    other = Graph([Node("cnn"), Node(outputs="elsewhere")], PAIR)
    assert not graph.equivalent(other)
    assert graph.equivalent(Graph([Node("cnn"), Node(outputs="there")], PAIR))


@pytest.mark.parametrize(
    ("node", "edge", "field"),
    [
        (Node("cnn", outputs="there"), "through", "nodes[1].model"),
        (Node(outputs="there", weights="w"), "through", "nodes[1].weights"),
        (Node(outputs="there", input="half"), "through", "nodes[1].input"),
        (Node(outputs=""), "through", "nodes[1].outputs"),
        (Node(), "through", "nodes[1].model"),
        (Node("recorded"), "through", "nodes[1].model"),
        (Node(outputs="there"), {"loss": "attention"}, "gates[0][1].loss"),
    ],
)
def test_what_a_recorded_node_cannot_be_is_refused(node: Node, edge: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        Graph([Node("cnn"), node], [["through", edge], ["cutoff", "cutoff"]])
    assert caught.value.field == field


def test_a_recorded_node_hears_nobody() -> None:
    recorded = Node(outputs="there")
    with pytest.raises(InputError, match=r"gates\[1\]: .*cutoff alone"):
        Graph(["cnn", recorded], [["through"] * 2] * 2)
    with pytest.raises(InputError, match=r"gates\[0\]: .*cutoff alone"):
        Graph([recorded, "cnn"], [["cutoff", "through"], ["through"] * 2])
    fields = {"name": "a", "outputs": "there", "model": "cnn"}
    text = {"nodes": [{"model": "cnn"}, fields], "gates": PAIR}
    with pytest.raises(InputError, match=r"nodes\[1\].model: .*an object with outputs \(and name"):
        Graph.from_json(text)
