"""What nodes take from others beside losses: their outputs together, an average of weights."""

from collections.abc import Sequence
from typing import NamedTuple

from ktg_jax.errors import InputError
from ktg_jax.graph.node import AVERAGE, ENSEMBLE, Node


class Ensemble(NamedTuple):
    """An ensemble: the index of its node, those of its members, and of what it is."""

    node: int
    members: tuple[int, ...]
    of: str


class Average(NamedTuple):
    """An average: the index of its node, that of the one whose weights it averages, its decay."""

    node: int
    source: int
    decay: float


class Derived(NamedTuple):
    """All nodes of a graph that take something from others beside losses. Static, and hashable.

    Attributes:
        ensembles: each behind the ensembles that are among its members.
        averages: in the order of their indices.

    >>> Derived().of(0)
    ()
    """

    ensembles: tuple[Ensemble, ...] = ()
    averages: tuple[Average, ...] = ()

    def of(self, index: int) -> tuple[int, ...]:
        """The nodes that a node takes something from."""
        found = {each.node: each.members for each in self.ensembles}
        found |= {each.node: (each.source,) for each in self.averages}
        return found.get(index, ())


PLAIN = Derived()
"""Of a graph without ensembles and averages."""


def derived_of(nodes: Sequence[Node], frozen: Sequence[int]) -> Derived:
    """The ensembles and averages among checked nodes.

    Args:
        nodes: with their names.
        frozen: indices of the nodes whose gates are all cutoff.

    Raises:
        InputError: a name that no node has, an ensemble of itself, an average of a node that does
            not learn, or one of either kind that is taught.
    """
    index = {str(node.name): i for i, node in enumerate(nodes)}
    special = [i for i, node in enumerate(nodes) if node.kind in (ENSEMBLE, AVERAGE)]
    for i in special:
        if i not in frozen:
            allowed = f"cutoff alone: the node is an {nodes[i].kind}, it never learns"
            raise InputError(f"gates[{i}]", "others", allowed)
    averages = [
        Average(i, _source(f"nodes[{i}].average", node, index, nodes, frozen), node.decay)
        for i, node in enumerate(nodes)
        if node.kind == AVERAGE
    ]
    ensembles: dict[int, Ensemble] = {}
    left = [i for i in special if nodes[i].kind == ENSEMBLE]
    members = {i: _members(f"nodes[{i}].ensemble", nodes[i], index, nodes) for i in left}
    while left:
        ready = [i for i in left if not set(members[i]) & set(left)]
        if not ready:
            allowed = "other nodes than itself, also by way of other ensembles"
            raise InputError(f"nodes[{left[0]}].ensemble", nodes[left[0]].ensemble, allowed)
        ensembles |= {i: Ensemble(i, members[i], nodes[i].of) for i in ready}
        left = [i for i in left if i not in ready]
    return Derived(tuple(ensembles.values()), tuple(averages))


def _members(
    field: str, node: Node, index: dict[str, int], nodes: Sequence[Node]
) -> tuple[int, ...]:
    for name in node.ensemble or ():
        if name not in index:
            raise InputError(field, name, f"names of other nodes: {', '.join(index)}")
        if nodes[index[name]].classes is not None:
            raise InputError(field, name, "nodes with the classes of the data")
    return tuple(index[name] for name in node.ensemble or ())


def _source(
    field: str, node: Node, index: dict[str, int], nodes: Sequence[Node], frozen: Sequence[int]
) -> int:
    name = str(node.average)
    learning = [n for n, i in index.items() if nodes[i].kind == "network" and i not in frozen]
    if name not in learning:
        raise InputError(field, name, f"a node that learns: {', '.join(learning) or 'none does'}")
    return index[name]
