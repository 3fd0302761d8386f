"""The search space: what is in it, how many, and that each graph is drawn as often as any other."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import GATES, Graph, InputError, Node, SearchSpace

PAPER = SearchSpace(3, "resnet32", ("resnet32", "resnet110", "wrn28_2"))
SMALL = SearchSpace(2, "cnn", ("cnn", "resnet8"), ("through", "cutoff"))
LINEAR = Graph((Node("cnn"), Node("cnn")), (("through", "linear"), ("through", "linear")))
PAIR = ktg.graphs.mutual(["cnn", "cnn"])
SPACES = [
    SearchSpace(1, "cnn", ()),
    SearchSpace(1, "cnn", (), ("correct", "cutoff"), (1.0, 2.0)),
    SearchSpace(1, "cnn", (), ("through", "correct")),
    SearchSpace(2, "cnn", ("cnn",), ("through", "cutoff")),
    SMALL,
    SearchSpace(2, "cnn", ("cnn", "resnet8"), GATES, (1.0, 4.0)),
    SearchSpace(2, "cnn", ("resnet8",), ("correct", "linear"), (1.0, 4.0)),
    SearchSpace(3, "cnn", ("cnn", "resnet8"), ("through", "cutoff"), (1.0, 2.0)),
    SearchSpace(3, "cnn", ("resnet8",), ("cutoff", "correct", "through")),
    SearchSpace(3, "cnn", ("cnn", "resnet8"), ("through", "linear")),
    SearchSpace(3, "cnn", ("cnn", "resnet8"), ("linear",)),
]


def name_of(space: SearchSpace) -> str:
    sizes = (space.num_nodes, *map(len, (space.candidates, space.gates, space.temperatures)))
    return "-".join(map(str, sizes))


def make(*fields: Any, **named_fields: Any) -> SearchSpace:
    """A space of anything: `SearchSpace` refuses what its fields' types exclude."""
    return SearchSpace(*fields, **named_fields)


def all_graphs(space: SearchSpace) -> Iterator[Graph]:
    """Every valid graph, from nothing but the definition."""
    n = space.num_nodes
    for models in itertools.product(space.candidates, repeat=n - 1):
        for gates in itertools.product(space.gates, repeat=n * n):
            if set(gates[:n]) == {"cutoff"}:
                continue
            rows = tuple(gates[i * n : (i + 1) * n] for i in range(n))
            for temperature in space.temperatures:
                yield Graph((Node(space.target), *map(Node, models)), rows, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES, ids=name_of)
def test_sizes_are_what_enumeration_counts(space: SearchSpace) -> None:
    graphs = list(all_graphs(space))
    assert len(set(graphs)) == len(graphs) == space.size()
    assert len({graph.canonical() for graph in graphs}) == space.size(up_to_equivalence=True)


def test_sizes_by_hand() -> None:
    # 4^9 gates but for the 4^6 whose target is cut off; 3^2 models.
    assert PAPER.size() == (4**9 - 4**6) * 9
    assert SearchSpace(7, "cnn", ("cnn", "resnet8", "wrn10_2")).size() == (4**49 - 4**42) * 3**6
    # Two nodes, through and cutoff, one candidate: 3 target rows x 4 rows.
    two = SearchSpace(2, "cnn", ("cnn",), ("through", "cutoff"))
    assert two.size() == 12
    # The target alone, or hearing node 1: then 2^3 other gates.
    assert two.size(up_to_equivalence=True) == 1 + 8
    # One node: through, correct and linear, of which the first two are the same.
    assert SearchSpace(1, "cnn", ()).size(up_to_equivalence=True) == 2


def test_the_papers_space_up_to_equivalence_is_what_enumeration_counts() -> None:
    """All 4^9 x 3^2 graphs as arrays, without `canonical` or the formula."""
    codes = np.array(list(itertools.product(range(4), repeat=9)), np.int64).reshape(-1, 3, 3)
    cut, diagonal = GATES.index("cutoff"), np.arange(3)
    codes = codes[(codes[:, 0] != cut).any(axis=1)]
    labels = codes[:, diagonal, diagonal]
    codes[:, diagonal, diagonal] = np.where(labels == GATES.index("correct"), 0, labels)
    hears = codes != cut
    needs_1 = hears[:, 0, 1] | (hears[:, 0, 2] & hears[:, 2, 1])
    needs_2 = hears[:, 0, 2] | (hears[:, 0, 1] & hears[:, 1, 2])

    def number(gates: np.ndarray, a: int, b: int) -> np.ndarray:
        return gates.reshape(len(gates), -1) @ 4 ** np.arange(9) * 16 + 4 * a + b

    found: list[np.ndarray] = []
    for a, b in itertools.product(range(1, 4), repeat=2):
        swapped = codes[:, [0, 2, 1]][:, :, [0, 2, 1]]
        both = np.minimum(number(codes, a, b), number(swapped, b, a))[needs_1 & needs_2]
        only_1, only_2, alone = codes[:, :2, :2], codes[:, ::2, ::2], codes[:, :1, :1]
        found.append(both)
        for graphs, model in ((only_1[needs_1 & ~needs_2], a), (only_2[needs_2 & ~needs_1], b)):
            found.append(-(graphs.reshape(-1, 4) @ 4 ** np.arange(4) * 16 + 4 * model))
        found.append(-(10**6) - alone[~needs_1 & ~needs_2].reshape(-1))
    assert len(np.unique(np.concatenate(found))) == PAPER.size(up_to_equivalence=True) == 420878


def test_more_than_three_nodes_are_not_counted_up_to_equivalence() -> None:
    with pytest.raises(InputError, match="num_nodes: got 4; allowed: 1 to 3"):
        SearchSpace(4, "cnn", ("cnn",)).size(up_to_equivalence=True)


def chi_square(counts: Counter[Any], num_kinds: int) -> float:
    expected = counts.total() / num_kinds
    missing = num_kinds - len(counts)
    return sum((n - expected) ** 2 for n in counts.values()) / expected + missing * expected


def test_each_valid_graph_is_drawn_as_often_as_any_other() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(SMALL.sample(rng) for _ in range(4800))
    assert counts.keys() == set(all_graphs(SMALL))
    assert len(counts) == 24
    assert chi_square(counts, 24) < 49.7  # 23 degrees of freedom: 1 in 1000 is above


def test_models_gates_and_temperatures_are_drawn_alike() -> None:
    space = SearchSpace(2, "cnn", ("cnn", "resnet8", "wrn10_2"), GATES[:3], (1.0, 2.0, 4.0))
    rng = np.random.default_rng(1)
    graphs = [space.sample(rng) for _ in range(3000)]
    for kinds in (
        Counter(graph.nodes[1].model for graph in graphs),
        Counter(graph.gates[1][0] for graph in graphs),
        Counter(graph.temperature for graph in graphs),
    ):
        assert chi_square(kinds, 3) < 13.8  # 2 degrees of freedom: 1 in 1000 is above


def test_the_same_generator_draws_the_same_graphs() -> None:
    rngs = [np.random.default_rng(seed) for seed in (3, 3, 4)]
    drawn = [[PAPER.sample(rng) for _ in range(5)] for rng in rngs]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5


def test_anything_but_a_generator_is_refused() -> None:
    seed: Any = 0
    with pytest.raises(InputError, match=r"rng: got 0; allowed: a numpy.random.Generator"):
        SMALL.sample(seed)


def test_parameters_have_these_names() -> None:
    graph = Graph(
        (Node("resnet32"), Node("wrn28_2"), Node("resnet110")),
        (
            ("through", "cutoff", "correct"),
            ("linear", "cutoff", "through"),
            ("cutoff", "cutoff", "linear"),
        ),
    )
    assert PAPER.parameters(graph) == {
        "node1.model": "wrn28_2",
        "node2.model": "resnet110",
        "gate.0.0": "through",
        "gate.0.1": "cutoff",
        "gate.0.2": "correct",
        "gate.1.0": "linear",
        "gate.1.1": "cutoff",
        "gate.1.2": "through",
        "gate.2.0": "cutoff",
        "gate.2.1": "cutoff",
        "gate.2.2": "linear",
        "temperature": 1.0,
    }
    assert PAPER.choices().keys() == PAPER.parameters(graph).keys()
    assert PAPER.graph(PAPER.parameters(graph)) == graph


@pytest.mark.parametrize("space", [*SPACES[:6], PAPER], ids=name_of)
def test_parameters_and_graphs_are_inverses(space: SearchSpace) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        graph = space.sample(rng)
        parameters = space.parameters(graph)
        assert space.graph(parameters) == graph
        assert space.parameters(space.graph(parameters)) == parameters
        assert json.loads(json.dumps(parameters)) == parameters
        for name, allowed in space.choices().items():
            assert parameters[name] in allowed


def test_named_methods_are_in_the_space() -> None:
    models = ["resnet32", "resnet110", "wrn28_2"]
    for graph in (
        ktg.graphs.independent(models),
        ktg.graphs.mutual(models),
        ktg.graphs.distillation(models[0], models[1:]),
    ):
        assert PAPER.graph(PAPER.parameters(graph)) == graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (ktg.graphs.mutual(["cnn"]), "nodes: got 1; allowed: 2 nodes"),
        (ktg.graphs.mutual(["resnet8", "cnn"]), r"nodes\[0\].model: got 'resnet8'; .* cnn"),
        (ktg.graphs.mutual(["cnn", "wrn10_2"]), "node1.model: got 'wrn10_2'; allowed: cnn, resn"),
        (ktg.graphs.mutual(["cnn", Node("cnn", "a", "runs/a")]), r"nodes\[1\].weights: got 'runs"),
        (LINEAR, "gate.0.1: got 'linear'; allowed: through, cutoff"),
        (ktg.graphs.mutual(["cnn", "cnn"], 4.0), "temperature: got 4.0; allowed: 1.0"),
        (
            ktg.graphs.mutual(["cnn", Node("cnn", prior="p")]),
            r"nodes\[1\].prior: got 'p'; .* no pr",
        ),
        (PAIR.carrying({"kl": 0.5}), r"gates\[0\]\[1\]: got .*; allowed: an edge of the space"),
        (
            ktg.Graph(["cnn"] * 2, [["through"] * 2, ["cutoff", ktg.Edge(weight=2)]]),
            r"gates\[1\]\[1\]: got .*; allowed: a gate, on a label edge",
        ),
    ],
)
def test_a_graph_of_another_space_is_refused(graph: Graph, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SMALL.parameters(graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate.1.1": None}, "gate.1.1: got None; allowed: through, cutoff"),
        ({"node1.model": "wrn10_2"}, "node1.model: got 'wrn10_2'; allowed: cnn, resnet8"),
        ({"temperature": 2.0}, "temperature: got 2.0; allowed: 1.0"),
        ({"gate.2.2": "through"}, "parameters: got 'gate.2.2'; allowed: node1.model, gate.0.0"),
        ({"gate.0.0": "cutoff", "gate.0.1": "cutoff"}, r"gates\[0\]: got .* not cutoff"),
    ],
)
def test_bad_parameters_are_refused(change: dict[str, Any], message: str) -> None:
    parameters = SMALL.parameters(ktg.graphs.mutual(["cnn", "cnn"]))
    with pytest.raises(InputError, match=message):
        SMALL.graph({**parameters, **change})


def test_a_missing_parameter_is_named() -> None:
    parameters = SMALL.parameters(ktg.graphs.mutual(["cnn", "cnn"]))
    del parameters["gate.1.0"]
    with pytest.raises(InputError, match=r"parameters: got 'no gate.1.0'"):
        SMALL.graph(parameters)


def test_lists_and_integers_make_the_same_space() -> None:
    space = make(2, "cnn", ["cnn", "resnet8"], ["through", "cutoff"], [1])
    assert space == SMALL
    assert hash(space) == hash(SMALL)
    assert space.temperatures == (1.0,)
    assert isinstance(space.temperatures[0], float)


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ((0, "cnn", ["cnn"]), "num_nodes", "1 to 7 nodes, or more with allow_large=True"),
        ((8, "cnn", ["cnn"]), "num_nodes", "1 to 7 nodes, or more with allow_large=True"),
        ((-1, "cnn", ["cnn"]), "num_nodes", "1 to 7"),
        ((2.0, "cnn", ["cnn"]), "num_nodes", "1 to 7"),
        ((True, "cnn", ["cnn"]), "num_nodes", "1 to 7"),
        ((2, "resnet9", ["cnn"]), "target", "resnet8"),
        ((2, None, ["cnn"]), "target", "a model's name"),
        ((2, "cnn", ["cnn", "vgg"]), "candidates[1]", "resnet8"),
        ((2, "cnn", [3]), "candidates[0]", "a model's name"),
        ((2, "cnn", "cnn"), "candidates", "a sequence"),
        ((2, "cnn", None), "candidates", "a sequence"),
        ((2, "cnn", []), "candidates", "at least one model"),
        ((2, "cnn", ["cnn", "cnn"]), "candidates[1]", "each value once"),
        ((1, "cnn", [], ["open"]), "gates[0]", "through, cutoff, linear, correct"),
        ((1, "cnn", [], [0]), "gates[0]", "through, cutoff, linear, correct"),
        ((1, "cnn", [], "through"), "gates", "a sequence"),
        ((1, "cnn", [], []), "gates", "at least one gate that is not cutoff"),
        ((1, "cnn", [], ["cutoff"]), "gates", "at least one gate that is not cutoff"),
        ((1, "cnn", [], ["linear", "linear"]), "gates[1]", "each value once"),
        ((1, "cnn", [], ["linear"], []), "temperatures", "at least one finite number above 0"),
        ((1, "cnn", [], ["linear"], [1.0, 0.0]), "temperatures[1]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], [-1]), "temperatures[0]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], [float("nan")]), "temperatures[0]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], [float("inf")]), "temperatures[0]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], [True]), "temperatures[0]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], ["4"]), "temperatures[0]", "a finite number above 0"),
        ((1, "cnn", [], ["linear"], [1, 1.0]), "temperatures[1]", "each value once"),
        ((1, "cnn", [], ["linear"], 4.0), "temperatures", "a sequence"),
    ],
)
def test_a_bad_space_is_refused(fields: tuple[Any, ...], field: str, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        make(*fields)
    assert error.value.field == field
    assert allowed in error.value.allowed
    assert "\n" not in str(error.value)


def test_large_spaces_are_had_by_asking_for_them() -> None:
    space = SearchSpace(8, "cnn", ("cnn",), allow_large=True)
    assert len(space.sample(np.random.default_rng(0)).nodes) == 8
    assert space.size() == 4**64 - 4**56
    assert SearchSpace(2, "cnn", ("cnn",), allow_large=True) == SearchSpace(2, "cnn", ("cnn",))
    with pytest.raises(InputError, match="num_nodes: got 0"):
        SearchSpace(0, "cnn", ("cnn",), allow_large=True)


def test_a_description_survives_json_and_names_what_differs() -> None:
    description = json.loads(json.dumps(PAPER.describe()))
    assert PAPER.differing(description) == ()
    other = SearchSpace(2, "resnet32", ("wrn28_2", "resnet32", "resnet110"), temperatures=(1, 2))
    assert other.differing(description) == ("num_nodes", "candidates", "temperatures")
    assert PAPER.differing({**description, "losses": ["kl"]}) == ("losses",)
    del description["gates"]
    assert PAPER.differing(description) == ("gates",)


def test_the_library_does_not_import_optuna() -> None:
    program = "import sys, ktg_jax; ktg_jax.SearchSpace; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_loss_that_is_written_in_two_ways_is_one() -> None:
    texts = ("kl", "decoupled_kl(beta=2.0)")
    space = SearchSpace(2, "cnn", ("cnn",), losses=texts)
    assert space.losses == ("kl", "decoupled_kl(beta=2)")
    with pytest.raises(InputError, match=r"losses\[2\]: got 'decoupled_kl\(beta=2\)'"):
        SearchSpace(2, "cnn", ("cnn",), losses=(*texts, "decoupled_kl( beta = 2 )"))
