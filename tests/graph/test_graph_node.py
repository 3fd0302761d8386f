"""Nodes with priors: checks, JSON, equivalence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktg_jax import Graph, InputError, Node

PAIR = (("through", "through"), ("linear", "through"))
PLAIN = Node("cnn", "peer")
WITH_PRIOR = Node(
    "cnn",
    "student",
    prior="runs/prior",
    prior_weight=0.5,
    prior_quantile=0.9,
    prior_schedule="constant",
    prior_matching="assignment",
)


def json_of(**fields: Any) -> dict[str, Any]:
    """A graph of two nodes, the second with these fields."""
    nodes = [{"model": "cnn"}, {"model": "cnn", **fields}]
    return {"nodes": nodes, "gates": [list(row) for row in PAIR]}


def test_a_prior_comes_back_from_json_and_files(tmp_path: Path) -> None:
    graph = Graph((WITH_PRIOR, PLAIN), PAIR, 2.0)
    assert graph.nodes[0] == WITH_PRIOR
    assert Graph.from_json(graph.to_json()) == graph
    graph.save(tmp_path / "graph.json")
    assert Graph.load(tmp_path / "graph.json") == graph
    assert json.loads(graph.to_json())["nodes"] == [
        {
            "name": "student",
            "model": "cnn",
            "weights": None,
            "prior": "runs/prior",
            "prior_weight": 0.5,
            "prior_quantile": 0.9,
            "prior_schedule": "constant",
            "prior_matching": "assignment",
        },
        {"name": "peer", "model": "cnn", "weights": None},
    ]


def test_options_may_be_left_out_of_json() -> None:
    node = Graph.from_json(json_of(prior="runs/prior")).nodes[1]
    assert node == Node("cnn", "cnn-1", None, "runs/prior", 1.0, 0.7, "linear", "initialise")
    whole = Graph.from_json(json_of(prior="p", prior_weight=0, prior_quantile=1)).nodes[1]
    assert (whole.prior_weight, whole.prior_quantile) == (0.0, 1.0)
    assert isinstance(whole.prior_weight, float)
    assert isinstance(whole.prior_quantile, float)
    assert Graph.from_json(json_of(prior=None)) == Graph.from_json(json_of())


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prior": 3}, "prior: got 3", "a path, or null"),
    ({"prior": ""}, "prior: got ''", "a path, or null"),
    ({"prior": "p", "prior_weight": -1}, "prior_weight: got -1", "a finite number of at least 0"),
    ({"prior": "p", "prior_weight": "1"}, "prior_weight: got '1'", "a finite number"),
    ({"prior": "p", "prior_weight": True}, "prior_weight: got True", "a finite number"),
    ({"prior": "p", "prior_weight": float("inf")}, "prior_weight: got inf", "a finite number"),
    ({"prior": "p", "prior_weight": float("nan")}, "prior_weight: got nan", "a finite number"),
    ({"prior": "p", "prior_quantile": 1.5}, "prior_quantile: got 1.5", "a number from 0 to 1"),
    ({"prior": "p", "prior_quantile": -0.1}, "prior_quantile: got -0.1", "from 0 to 1"),
    ({"prior": "p", "prior_quantile": None}, "prior_quantile: got None", "from 0 to 1"),
    ({"prior": "p", "prior_schedule": "cosine"}, "prior_schedule: got 'cosine'", "linear, con"),
    ({"prior": "p", "prior_matching": []}, "prior_matching: got []", "initialise, kernels, ass"),
    ({"prior_weight": 2.0}, "prior_weight: got 2.0", "nothing: the node has no prior"),
    ({"prior_quantile": 0.5}, "prior_quantile: got 0.5", "nothing: the node has no prior"),
    ({"prior_schedule": "constant"}, "prior_schedule: got 'constant'", "no prior"),
    ({"prior_matching": "none"}, "prior_matching: got 'none'", "no prior"),
]


@pytest.mark.parametrize(("fields", "start", "allowed"), BAD, ids=lambda x: str(x)[:50])
def test_bad_options_are_refused_by_node_and_field(
    fields: dict[str, Any], start: str, allowed: str
) -> None:
    made: Any = Node
    for make in (
        lambda: Graph.from_json(json_of(**fields)),
        lambda: Graph((PLAIN, made("cnn", **fields)), PAIR),
    ):
        with pytest.raises(InputError) as error:
            make()
        assert str(error.value).startswith(f"nodes[1].{start}; allowed: ")
        assert allowed in str(error.value)


def test_json_names_even_a_default_of_a_prior_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"^nodes\[1\].prior_weight: got 1.0; allowed: nothing"):
        Graph.from_json(json_of(prior_weight=1.0))
    with pytest.raises(InputError, match=r"^nodes\[1\].priors: got 'a'; allowed: an object with"):
        Graph.from_json(json_of(priors="a"))


def test_a_frozen_node_has_no_prior() -> None:
    with pytest.raises(InputError) as error:
        Graph((PLAIN, WITH_PRIOR), (("through", "through"), ("cutoff", "cutoff")))
    assert str(error.value).startswith("nodes[1].prior: got 'runs/prior'; allowed: no prior")


OTHERS = [
    replace(WITH_PRIOR, prior="runs/other"),
    replace(WITH_PRIOR, prior_weight=1.0),
    replace(WITH_PRIOR, prior_quantile=0.7),
    replace(WITH_PRIOR, prior_schedule="linear"),
    replace(WITH_PRIOR, prior_matching="none"),
    Node("cnn", "student"),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_priors_make_other_graphs(other: Node) -> None:
    graph = Graph((WITH_PRIOR, PLAIN), PAIR)
    assert not graph.equivalent(Graph((other, PLAIN), PAIR))
    # Among peers, too: which of them stands first does not matter, which prior they have does.
    three = [["through"] * 3] * 3

    def among_peers(*peers: Node) -> Graph:
        nodes = [replace(peer, name=f"peer{i}") for i, peer in enumerate(peers)]
        gates: Any = three
        return Graph((PLAIN, *nodes), gates)

    one, two = among_peers(WITH_PRIOR, other), among_peers(other, WITH_PRIOR)
    assert one.equivalent(two)
    assert not one.equivalent(among_peers(WITH_PRIOR, WITH_PRIOR))
    assert {node.prior for node in one.canonical().nodes} == {None, WITH_PRIOR.prior, other.prior}


def test_a_prior_of_a_node_that_the_target_does_not_need_is_forgotten() -> None:
    independent = (("through", "cutoff"), ("cutoff", "through"))
    graph = Graph((PLAIN, WITH_PRIOR), independent)
    assert graph.canonical() == Graph((PLAIN,), (("through",),)).canonical()
    pruned = Graph((WITH_PRIOR, PLAIN), independent).pruned()
    assert pruned.nodes == (WITH_PRIOR,)
