"""Who trains which nodes, whom that process hears, and what is said in one vector."""

from typing import Any

import chex
import jax
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import Edge, Graph, Node
from ktg_jax.graph.derived import Average, Derived
from ktg_jax.training.exchange import Exchange, Later, Mailbox
from ktg_jax.training.hosts import any_of, by_first, is_first, of_process, shared
from ktg_jax.training.shares import owners, shares_of_edges


@pytest.mark.parametrize(
    ("costs", "averages", "processes", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], (), 2, (0, 1, 0, 1)),
        ([4.0, 1.0, 1.0, 1.0], (), 2, (0, 1, 1, 1)),
        ([1.0, 1.0, 1.0], (Average(2, 1, 0.9),), 2, (1, 0, 0)),
        ([1.0], (), 3, (0,)),
        ([2.0, 0.0, 2.0], (), 2, (0, 0, 1)),
    ],
)
def test_nodes_are_spread_by_cost_and_averages_stay_with_what_they_average(
    costs: list[float], averages: tuple[Average, ...], processes: int, expected: tuple[int, ...]
) -> None:
    assert owners(costs, Derived(averages=averages), processes) == expected


def shares(rows: Any, nodes: Any = ("cnn", "cnn", "cnn"), owner: Any = (0, 1, 1)) -> Any:
    graph = Graph(nodes, rows)
    are_networks = [node.kind in ("network", "average") for node in graph.nodes]
    return shares_of_edges(owner, graph.edge_arrays, graph.derived, are_networks, 2)


def test_only_what_is_heard_across_processes_is_said() -> None:
    cut = "cutoff"
    found = shares([["through", "linear", cut], [cut, "through", "through"], [cut, cut, "through"]])
    assert found.said_now == ((), (1,))
    assert found.said_ahead == ((), ())
    assert found.waits
    silent = Edge(weight=0.0)
    found = shares([["through", silent, cut], [cut, "through", "through"], [cut, cut, "through"]])
    assert found.said_now == ((), ())
    assert not found.waits


def test_what_is_heard_late_is_said_ahead_and_nobody_waits() -> None:
    late = Edge(delay=2)
    rows = [["through", late, "cutoff"], [late, "through", "linear"], ["cutoff"] * 3]
    found = shares(rows)
    assert found.said_now == ((), ())
    assert found.said_ahead == ((1,), (0,))
    # A frozen sender has nothing new to say: what it says now is what it said.
    rows[0] = ["through", "cutoff", Edge(delay=2)]
    assert shares(rows).said_now == ((), (2,))


def test_behind_an_ensemble_are_its_members() -> None:
    nodes = [Node("cnn", "a"), Node("cnn", "b"), Node(name="both", ensemble=("a", "b"))]
    cut = "cutoff"
    rows = [["through", cut, "through"], [cut, "through", cut], [cut] * 3]
    found = shares(rows, nodes, (0, 1, 0))
    assert found.said_now == ((), (1,))
    assert found.known == (True, True, True)
    apart = [["through", cut, cut], [cut, "through", cut], [cut] * 3]
    found = shares(apart, nodes, (0, 1, 0))
    assert found.said_now == ((), ())
    assert found.known == (True, True, False)


def test_a_message_comes_back_as_it_was_sent() -> None:
    message = {3: ktg.Outputs(np.ones((2, 5), np.float32), (np.full((2, 1), 2.5, np.float32),))}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), message)
    (back,) = Exchange([shapes])(message)
    chex.assert_trees_all_equal(back, message)
    assert Exchange([{}, {}]).is_silent
    assert Exchange([{}, {}])({}) == [{}, {}]


@pytest.mark.parametrize("at_once", [True, False])
def test_answers_are_taken_in_order_and_may_be_looked_at_before(at_once: bool) -> None:
    shape = jax.ShapeDtypeStruct((), np.float32)
    mailbox = Mailbox(Exchange([{"x": shape}]), at_once)
    posted = [mailbox.post(k, {"x": np.float32(k)}) for k in range(4)]
    assert float(np.asarray(Later(posted[2], lambda said: said[0]["x"]))) == 2
    assert [number for number, _ in mailbox.wait()] == [0, 1, 2, 3]
    assert [(k, float(said[0]["x"])) for k, said in mailbox.arrived(1)] == [(0, 0.0), (1, 1.0)]
    assert [k for k, _ in mailbox.wait()] == [2, 3]
    assert mailbox.arrived(1) == []


def test_a_single_process_is_the_first_and_has_nobody_to_tell() -> None:
    assert is_first()
    assert by_first(lambda: {"a": 1}) == {"a": 1}
    assert not any_of(False)
    assert any_of(True)
    tree = {"a": np.arange(3, dtype=np.int32)}
    assert shared(tree) is tree
    shapes = {"a": jax.ShapeDtypeStruct((3,), np.int32), "key": jax.eval_shape(jax.random.key, 0)}
    mine = of_process({**tree, "key": jax.random.key(4)}, 0, shapes)
    np.testing.assert_array_equal(mine["a"], tree["a"])
    assert jax.random.key_data(mine["key"]).tolist() == [0, 4]
