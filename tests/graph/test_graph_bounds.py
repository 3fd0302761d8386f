"""Graphs from outside are refused in bounded time and memory, and by what is wrong with them."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ktg_jax as ktg
from ktg_jax import Graph, InputError, Node
from ktg_jax.draw import draw_graph
from ktg_jax.errors import part_of, shown
from ktg_jax.io.json_input import MOST_CHARACTERS
from ktg_jax.models import check_model

BIG = "9" * 5000
SECONDS = 10.0
"""Within which a refusal comes, also on a busy machine."""


def refusal(make: Callable[[], object]) -> str:
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        make()
    assert time.monotonic() - begin < SECONDS
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


def of(text: str) -> str:
    """Why a JSON text is no graph."""
    return refusal(lambda: Graph.from_json(text))


def graph_text(node: str = '"model": "cnn"', more: str = "", gates: str = '[["through"]]') -> str:
    return f'{{"nodes": [{{{node}}}], "gates": {gates}{more}}}'


def test_this_text_is_a_graph() -> None:
    assert Graph.from_json(graph_text()) == ktg.graphs.independent(["cnn"])


# --- how many nodes


def test_a_hundred_nodes_are_a_graph() -> None:
    graph = ktg.graphs.mutual(["cnn"] * 100)
    assert Graph.from_json(graph.to_json()) == graph
    assert graph.canonical().gates == graph.gates


def endless() -> Iterator[str]:
    while True:
        yield "cnn"


TOO_MANY: dict[str, Callable[[], object]] = {
    "preset": lambda: ktg.graphs.mutual(["cnn"] * 10_000),
    "graph": lambda: Graph((Node("cnn"),) * 10_000, ()),
    "teachers": lambda: ktg.graphs.distillation("cnn", ["cnn"] * 100),
    "json": lambda: Graph.from_json({"nodes": [{"model": "cnn"}] * 10_000, "gates": []}),
}


@pytest.mark.parametrize("make", TOO_MANY.values(), ids=TOO_MANY)
def test_more_are_refused_before_anything_is_built(make: Callable[[], object]) -> None:
    assert refusal(make).startswith("nodes: got 1")
    assert refusal(make).endswith("; allowed: at most 100 nodes")


def test_endless_nodes_are_refused() -> None:
    make: Any = Graph
    assert refusal(lambda: make(endless(), [])) == "nodes: got 101; allowed: at most 100 nodes"


def test_a_search_space_has_no_larger_graphs() -> None:
    space = ktg.SearchSpace(100, "cnn", ("cnn",), allow_large=True)
    assert len(space.sample(np.random.default_rng(0)).nodes) == 100
    for number in (101, 10**9, 10**5000):
        message = refusal(lambda n=number: ktg.SearchSpace(n, "cnn", ("cnn",), allow_large=True))  # type: ignore[misc]
        assert message.startswith("num_nodes: got ")
        assert message.endswith("; allowed: 1 to 100 nodes")


def test_nodes_that_all_look_alike_end_in_an_error_not_in_hours() -> None:
    """Pairs that hear each other: k pairs have k! orders."""

    def pairs(number: int) -> Graph:
        n = 2 * number + 1
        gates = np.full((n, n), "cutoff", object)
        gates[0] = "through"
        for i in range(1, n, 2):
            gates[i, i + 1] = gates[i + 1, i] = "linear"
        return ktg.Graph(("cnn",) * n, gates)

    few = pairs(4)
    shuffled = [0, 5, 6, 2, 1, 7, 8, 4, 3]
    gates = np.array(few.gates, object)[np.ix_(shuffled, shuffled)]
    assert few.equivalent(ktg.Graph(few.nodes, gates))
    message = refusal(lambda: pairs(20).canonical())
    assert message.startswith("nodes: got 41; allowed: a graph in which fewer nodes look alike")


def test_the_picture_of_many_nodes_stays_small(tmp_path: Path) -> None:
    graph = ktg.graphs.chain(["cnn"] * 60)
    draw_graph(graph, [tmp_path / "graph.png", tmp_path / "graph.svg"])
    with Image.open(tmp_path / "graph.png") as picture:
        assert 2000 < max(picture.size) < 5000


# --- JSON


@pytest.mark.parametrize(
    ("text", "start", "allowed"),
    [
        (graph_text(more=f', "temperature": {BIG}'), "graph: got '{", "JSON (Exceeds the limit"),
        (graph_text(f'"model": "cnn", "prior_weight": {BIG}'), "graph: got", "JSON (Exceeds"),
        (graph_text(gates=f'[[{{"weight": -{BIG}}}]]'), "graph: got", "JSON (Exceeds"),
        (graph_text(more=f', "temperature": {BIG[:4000]}'), "temperature: got an int", "finite"),
        (graph_text(more=', "temperature": 1e999'), "temperature: got inf", "a finite number"),
        (graph_text(more=', "temperature": -Infinity'), "temperature: got -inf", "a finite number"),
        (graph_text(more=', "temperature": 1e300'), "temperature: got 1e+300", "1e-15 to 1e+15"),
        (graph_text(more=', "temperature": 1e-300'), "temperature: got 1e-300", "1e-15 to 1e+15"),
        (graph_text(gates='[[{"weight": 1e300}]]'), "gates[0][0].weight: got 1e+300", "at most 1e"),
        (
            graph_text('"model": "cnn", "prior": "p", "prior_weight": 1e300'),
            "nodes[0].prior_weight: got 1e+300",
            "at most 1e+30",
        ),
        ("[" * 100_000, "graph: got '[", "JSON ("),
        ('{"nodes": ' * 100_000, "graph: got", "JSON ("),
        (graph_text(more=', "temperature": ' + "[" * 900 + "]" * 900), "temperature: got [", "fin"),
        (graph_text(more=', "nodes": []'), "graph.nodes: got []", "each field once"),
        (graph_text('"model": "cnn", "model": "resnet8"'), "graph.model: got 'resnet8'", "once"),
        (graph_text(more=" " * MOST_CHARACTERS), "graph: got ", "JSON of at most 10,000,000 char"),
        (graph_text(f'"model": "cnn", "name": "{"a" * 256}"'), "nodes[0].name: got", "at most 255"),
        (graph_text(f'"model": "{"a" * 256}"'), "nodes[0].name: got", "at most 255"),
        (graph_text(r'"model": "cnn", "name": "a\u0007"'), r"nodes[0].name: got 'a\x07'", "letter"),
        (graph_text(r'"model": "cnn", "name": "ä"'), "nodes[0].name: got 'ä'", "letters"),
        (graph_text(r'"model": "cnn", "weights": "a\u0000b"'), "nodes[0].weights: got", "a path"),
        (graph_text(r'"model": "cnn", "weights": "\ud800"'), "nodes[0].weights: got", "a path"),
        (graph_text(f'"model": "cnn", "weights": "{"a" * 5000}"'), "nodes[0].weights", "a path"),
        (graph_text(r'"model": "cnn", "prior": "a\u0000b"'), "nodes[0].prior: got", "a path, or n"),
        (graph_text(more=f', "{"k" * 10_000}": 1'), "graph.'kkk", "an object with gates, nodes"),
        (graph_text(more=r', "a\nb": 1'), r"graph.'a\nb': got 1", "an object with gates, nodes"),
        (graph_text(f'"model": {json.dumps([["x" * 999] * 50] * 50)}'), "nodes[0].model", "a m"),
    ],
    ids=lambda x: x[:40] + x[-20:],
)  # fmt: skip
def test_extreme_json_is_refused_in_one_short_line(text: str, start: str, allowed: str) -> None:
    message = of(text)
    assert message.startswith(start)
    assert allowed in message.partition("; allowed: ")[2]


def test_extreme_values_are_still_a_graph() -> None:
    name = "a" * 255
    fields = f'"model": "cnn", "name": "{name}", "weights": ""'
    gates = '[[{"weight": 1e30}]]'
    graph = Graph.from_json(graph_text(fields, ', "temperature": 1e15', gates))
    assert (graph.nodes[0].name, graph.temperature) == (name, 1e15)
    assert graph.edges[0][0].losses == {"cross_entropy": 1e30}


@pytest.mark.parametrize(
    ("text", "start", "meant"),
    [
        ('{"nodes": [{"model": "cnn"}], "gate": [["through"]]}', "graph.gate: got [['thr", "gates"),
        ('{"node": [], "gates": []}', "graph.node: got []", "nodes"),
        (graph_text(more=', "temprature": 4'), "graph.temprature: got 4", "temperature"),
        (graph_text(more=', "Temperature": 4'), "graph.Temperature: got 4", "temperature"),
        (graph_text(gates='[[{"wieght": 4}]]'), "gates[0][0].wieght: got 4", "weight"),
        (graph_text('"modle": "cnn"'), "nodes[0].modle: got 'cnn'", "model"),
        (graph_text('"model": "cnn", "weight": "a"'), "nodes[0].weight: got 'a'", "weights"),
        (
            graph_text('"model": "cnn", "prior": "p", "prior_quantil": 0.5'),
            "nodes[0].prior_quantil: got 0.5",
            "prior_quantile",
        ),
    ],
)
def test_an_unknown_field_comes_first_with_the_known_one_that_is_meant(
    text: str, start: str, meant: str
) -> None:
    assert of(text).startswith(start)
    assert of(text).endswith(f"; did you mean {meant!r}?")


def test_a_field_like_no_other_has_no_suggestion_and_what_is_missing_is_named() -> None:
    assert "did you mean" not in of(graph_text(more=', "zzz": 1'))
    message = of('{"nodes": []}')
    assert message.startswith("graph.gates: got None; allowed: an object with gates, nodes (and ")
    assert message.endswith("; gates is missing")
    assert of(graph_text('"name": "a"')).endswith("; model is missing")


# --- files


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(graph_text(), encoding="utf-8-sig")
    assert Graph.load(tmp_path / "graph.json") == Graph.from_json(graph_text())


def test_what_would_never_end_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero", "a\0b", "a" * 5000):
        message = refusal(lambda path=path: Graph.load(path))  # type: ignore[misc]
        assert message.startswith("graph: got ")
        assert "allowed: a readable JSON file" in message


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "graph.json").open("w") as file:
        file.truncate(10**12)  # takes no room on the disk
    message = refusal(lambda: Graph.load(tmp_path / "graph.json"))
    assert "JSON of at most 10,000,000 characters" in message


# --- models


@pytest.mark.parametrize(
    "name",
    [
        "resnet999999998",
        f"resnet{BIG}",
        f"resnet8_{BIG}",
        f"wrn28_{BIG}",
        f"wrn{BIG}_1",
        "resnet1208",
        "resnet8_1025",
        "resnet1202_1024",
        "wrn10_65",
        "wrn1204_1",
        "resnet\u0668",  # a digit 8, but not of ours
    ],
    ids=lambda name: name[:20],
)
def test_networks_that_cannot_be_built_are_refused(name: str) -> None:
    for make in (lambda: check_model(name), lambda: ktg.build_model(name, 10)):
        message = refusal(make)
        assert message.startswith("model: got 'resnet" if "res" in name else "model: got 'wrn")
        assert "up to 1,202 layers, 1,024 channels" in message


def test_networks_that_can_be_built_are_not() -> None:
    for name in ("resnet1202", "resnet110_64", "resnet8_1024", "wrn28_10", "wrn40_14", "wrn10_64"):
        check_model(name)


@pytest.mark.parametrize(
    "number", [0, -1, 10**7, 10**5000, 2.5, "10", None], ids=lambda n: shown(n)
)
def test_impossible_numbers_of_classes_are_refused(number: Any) -> None:
    message = refusal(lambda: ktg.build_model("cnn", number))
    assert message.startswith("num_classes: got ")
    assert message.endswith("; allowed: an integer from 1 to 1,000,000")


# --- what errors say


def test_values_are_shown_whole_where_they_are_short() -> None:
    for value in (1, -2.5, "a", None, True, [1, ["a"]], {"a": (1,)}, "x" * 400, 10**400):
        assert shown(value) == repr(value)


def test_long_values_are_shown_in_part() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        "x" * 10**6,
        list(range(10**6)),
        [["y" * 999] * 999] * 999,
        deep,
        {i: i for i in range(10**6)},
    ):
        assert len(shown(value)) < 1100
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert shown([-(10**5000)]) == "[an integer of about 5,000 digits]"


def test_a_parts_error_says_what_it_is_a_part_of() -> None:
    for inner, outer in (
        ("weights", "nodes[1].weights"),
        ("gates[0]", "nodes[1].weights: gates[0]"),
    ):
        with pytest.raises(InputError) as error, part_of("nodes[1].weights"):
            raise InputError(inner, 3, "4")
        assert str(error.value) == f"{outer}: got 3; allowed: 4"
        assert (error.value.field, error.value.value, error.value.allowed) == (outer, 3, "4")
