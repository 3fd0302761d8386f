"""Drawing graphs: roles first, by changing another graph a little, and with teachers."""

from collections import Counter

import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import InputError, Node, SearchSpace
from ktg_jax.space.draws import DRAWS, by_roles, drawn, mutated, repaired, roles_of

TEACHER = Node("resnet20", "big", weights="runs/big", input="imagenet")
SPACE = SearchSpace(3, "cnn", ("cnn", "resnet8"), temperatures=(1.0, 4.0), teachers=(TEACHER,))
PLAIN = SearchSpace(3, "cnn", ("cnn",))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("how", DRAWS)
def test_every_draw_is_a_valid_graph(how: str) -> None:
    random = rng()
    for _ in range(300):
        parameters = drawn(SPACE, random, how)
        graph = SPACE.graph(parameters)  # raises InputError for one that is not valid
        assert SPACE.parameters(graph) == parameters


def test_roles_are_uniform() -> None:
    random = rng()
    counts = Counter(tuple(roles_of(PLAIN, by_roles(PLAIN, random)).values()) for _ in range(1800))
    assert len(counts) == 9  # two nodes, each absent, learning or frozen
    expected = 200
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 26.1  # 8 degrees: 0.001


def test_uniform_draws_hardly_have_a_frozen_teacher_and_roles_do() -> None:
    def share(how: str) -> float:
        random = rng()
        graphs = (PLAIN.sample(random, how).pruned() for _ in range(500))
        return sum(bool(graph.frozen) for graph in graphs) / 500

    assert share("uniform") < 0.06
    assert share("roles") > 0.4


def test_nodes_that_are_there_matter_to_the_target() -> None:
    random = rng()
    for _ in range(200):
        graph = SPACE.sample(random, "roles")
        for i in range(1, 3):
            is_heard = any(graph.gates[t][i] != "cutoff" for t in range(3) if t != i)
            assert (i in graph.needed_nodes()) == is_heard


def test_teachers_are_drawn_and_never_learn() -> None:
    random = rng()
    found = 0
    for how in DRAWS:
        for _ in range(200):
            graph = SPACE.sample(random, how)
            for i, node in enumerate(graph.nodes):
                if node.weights == "runs/big":
                    found += 1
                    assert i in graph.frozen
                    assert (node.name, node.input) == (f"big-{i}", "imagenet")
    assert found > 100


def test_small_changes_stay_in_the_space_and_reach_everything() -> None:
    random = rng()
    parameters = by_roles(SPACE, random)
    seen: set[tuple[str, object]] = set()
    for _ in range(1500):
        changed = mutated(SPACE, parameters, random)
        graph = SPACE.graph(changed)
        seen |= {(role, graph.nodes[i].model) for i, role in roles_of(SPACE, changed).items()}
        seen |= {("T", graph.temperature), ("label", graph.gates[0][0])}
        parameters = changed
    kinds = [("learning", "cnn"), ("learning", "resnet8"), ("frozen", "cnn"), ("frozen", "resnet8")]
    assert {*kinds, ("frozen", "resnet20"), ("T", 1.0), ("T", 4.0)} <= seen
    assert {("label", gate) for gate in SPACE.gates} <= seen


def test_a_change_leaves_what_was_given_alone() -> None:
    random = rng()
    parameters = by_roles(SPACE, random)
    before = dict(parameters)
    mutated(SPACE, parameters, random)
    assert parameters == before


def test_draws_without_cutoff_have_learning_nodes_alone() -> None:
    space = SearchSpace(3, "cnn", ("cnn",), ("through", "linear"))
    random = rng()
    for _ in range(50):
        graph = space.sample(random, "roles")
        assert graph.needed_nodes() == (0, 1, 2)
        assert graph.frozen == ()
        space.graph(mutated(space, space.parameters(graph), random))


def test_what_is_given_stays_and_the_rest_is_made_valid() -> None:
    given = {"node1.model": "big", "gate.0.0": "cutoff"}
    drawn_first = dict.fromkeys(SPACE.choices(), "cutoff") | {
        "node1.model": "cnn",
        "node2.model": "cnn",
        "gate.1.1": "through",
        "temperature": 1.0,
    }
    made = repaired(SPACE, drawn_first, given, rng())
    assert (made["node1.model"], made["gate.0.0"], made["gate.1.1"]) == ("big", "cutoff", "cutoff")
    assert {made["gate.0.1"], made["gate.0.2"]} != {"cutoff"}


def test_a_space_with_teachers_is_counted_and_described() -> None:
    space = SearchSpace(2, "cnn", ("cnn",), ("through", "cutoff"), teachers=(TEACHER,))
    # 3 rows of the target; a learning or frozen cnn has 4 rows, the teacher one.
    assert space.size() == 3 * (4 + 1)
    graphs = {space.sample(rng(seed)) for seed in range(300)}
    assert len(graphs) == 15
    assert SearchSpace(**space.describe()) == space
    assert space.describe()["teachers"] == [TEACHER.to_dict()]
    with pytest.raises(InputError, match=r"teachers: got \['big'\]; allowed: none"):
        space.size(up_to_equivalence=True)


def test_bad_teachers_are_refused() -> None:
    def space(*teachers: Node, gates: tuple[str, ...] = ktg.GATES[:4]) -> SearchSpace:
        return SearchSpace(2, "cnn", ("cnn",), gates, teachers=teachers)

    bad = [
        ((Node("resnet8", "a"),), r"teachers\[0\]: .*weights or outputs"),
        ((Node("resnet8", "cnn", weights="a"),), r"teachers\[0\].name: got 'cnn'"),
        ((TEACHER, Node("cnn", "big", weights="b")), r"teachers\[1\].name: got 'big'"),
        (
            (TEACHER, Node("resnet20", "other", weights="runs/big", input="imagenet")),
            r"teachers\[1\]: got 'other'; allowed: each network once: it is big",
        ),
        ((Node(ensemble=("a", "b"), name="e"),), r"teachers\[0\]: "),
    ]
    for teachers, message in bad:
        with pytest.raises(InputError, match=message):
            space(*teachers)
    with pytest.raises(InputError, match=r"gates: .*cutoff among them"):
        space(TEACHER, gates=("through", "linear"))
    taught = SPACE.sample(rng())
    parameters = SPACE.parameters(taught) | {"node1.model": "big", "gate.1.0": "through"}
    with pytest.raises(InputError, match=r"gate.1.0: got 'through'; allowed: cutoff: big is"):
        SPACE.graph(parameters)


def test_another_way_to_draw_is_refused() -> None:
    with pytest.raises(InputError, match=r"draw: got 'random'; allowed: roles, uniform"):
        PLAIN.sample(rng(), "random")
