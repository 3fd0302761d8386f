"""Which process trains which nodes, and whom it has to hear for that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.gates import is_cut
from ktg_jax.graph.derived import Derived


def owners(costs: Sequence[float], derived: Derived, processes: int) -> tuple[int, ...]:
    """The process of each node: balanced by what nodes cost, an average beside what it averages.

    Args:
        costs: one a node, in any unit; 0 for a node that has no network.
        derived: `Graph.derived`.
        processes: how many there are.

    >>> owners([3.0, 1.0, 1.0, 0.0], Derived(), 2)
    (0, 1, 1, 0)
    """
    load, found = [0.0] * processes, [0] * len(costs)
    beside = {each.node: each.source for each in derived.averages}
    together = [
        sum(costs[j] for j in range(len(costs)) if beside.get(j, j) == i) for i in range(len(costs))
    ]
    for i in sorted(range(len(costs)), key=lambda i: (-together[i], i)):
        if i not in beside and costs[i]:
            found[i] = load.index(min(load))
            load[found[i]] += together[i]
    return tuple(found[beside.get(i, i)] for i in range(len(costs)))


@dataclass(frozen=True)
class Shares:
    """What each process says and hears in an update.

    Attributes:
        owner: the process of each node.
        said_now: by process, the nodes that others hear as they are now.
        said_ahead: by process, positions in `edges.delayed` of stale senders that change.
        known: of each node, whether its own process knows all that it is made of.
    """

    owner: tuple[int, ...]
    said_now: tuple[tuple[int, ...], ...]
    said_ahead: tuple[tuple[int, ...], ...]
    known: tuple[bool, ...]

    @property
    def waits(self) -> bool:
        """Whether somebody has to wait in an update for what is said in it."""
        return any(self.said_now)


def shares_of_edges(
    owner: tuple[int, ...],
    edges: EdgeArrays,
    derived: Derived,
    are_networks: Sequence[bool],
    processes: int,
) -> Shares:
    """Who has to say what.

    Args:
        owner: the process of each node.
        edges: concrete arrays.
        derived: `Graph.derived`.
        are_networks: whether each node puts out something by a network of its own; what the others
            put out everybody knows, or knows how to make.
        processes: how many there are.
    """
    number = len(owner)
    carries = np.asarray(edges.weights).any(axis=0) & ~np.asarray(is_cut(edges.gates))
    members = {each.node: set(each.members) for each in derived.ensembles}

    def made_of(nodes: set[int]) -> set[int]:
        """The networks behind some nodes."""
        while found := nodes & set(members):
            nodes = (nodes - found).union(*(members[i] for i in found))
        return {i for i in nodes if are_networks[i]}

    now = []
    for process in range(processes):
        heard = set()
        for t in (t for t in range(number) if owner[t] == process):
            for column in np.flatnonzero(carries[t]):
                late = edges.delayed[column - number] if column >= number else None
                if late is None or not late.changes:
                    heard.add(int(column) if late is None else late.sender)
        now.append(made_of(heard))
    said_now = tuple(
        tuple(sorted({i for q in range(processes) if q != p for i in now[q] if owner[i] == p}))
        for p in range(processes)
    )
    said_ahead = tuple(
        tuple(d for d, each in enumerate(edges.delayed) if each.changes and owner[each.sender] == p)
        for p in range(processes)
    )
    known = tuple(
        all(owner[j] == owner[i] or j in now[owner[i]] for j in made_of({i})) for i in range(number)
    )
    return Shares(owner, said_now, said_ahead, known)
