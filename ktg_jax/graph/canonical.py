"""Which of the orders of a graph's nodes stands for all of them: two numberings of one graph agree.

Nodes are told apart by what they are and by whom they hear and teach (colour refinement). Where
nodes still look the same each of them in turn is put first, and the smallest matrix wins.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ktg_jax.errors import InputError

Matrix = Sequence[Sequence[int]]

_MOST_ENTRIES = 400_000
"""The most entries of all matrices that are compared, which takes seconds."""


def canonical_order(kinds: Sequence[Any], edges: Matrix) -> tuple[int, ...]:
    """An order of the nodes that makes numberings of one graph the same.

    Args:
        kinds: what each of the N nodes is, whatever its number: hashable, and comparable with each
            other.
        edges: int `[N, N]`, what lies between each two nodes, and on the diagonal at each.

    Returns:
        A permutation of 0..N-1. `kinds` in this order are sorted, and both `kinds` and `edges` in
        this order are the same for every numbering of the nodes.

    Raises:
        InputError: so many nodes look alike that too many orders had to be compared: more than
            400,000 / N^2, which no graph of up to 8 nodes has.

    >>> canonical_order("bab", [[0, 0, 0], [0, 0, 5], [0, 0, 0]])  # "a", then the one it hears
    (1, 0, 2)
    >>> canonical_order("bba", [[0, 0, 0], [0, 0, 0], [0, 5, 0]])
    (2, 0, 1)
    """
    most = _MOST_ENTRIES // len(kinds) ** 2
    orders = list(itertools.islice(_orders(_ranks(kinds), edges), most + 1))
    if len(orders) > most:
        allowed = f"a graph in which fewer nodes look alike: more than {most:,} orders of them do"
        raise InputError("nodes", len(kinds), allowed)
    return min(orders, key=lambda order: [[edges[t][s] for s in order] for t in order])


def _orders(colours: Sequence[int], edges: Matrix) -> Iterator[tuple[int, ...]]:
    """The orders by colour, one for each way to tell nodes of one colour apart."""
    colours = _refined(colours, edges)
    nodes = range(len(colours))
    shared = [colour for colour in colours if colours.count(colour) > 1]
    if not shared:
        yield tuple(sorted(nodes, key=colours.__getitem__))
        return
    tried: list[int] = []
    for node in nodes:
        if colours[node] != min(shared) or any(_are_twins(node, other, edges) for other in tried):
            continue
        tried.append(node)
        yield from _orders(_ranks([(c, i != node) for i, c in enumerate(colours)]), edges)


def _refined(colours: Sequence[int], edges: Matrix) -> list[int]:
    """Splits colours until nodes of one colour hear and teach the same colours in the same way."""
    nodes = range(len(colours))
    while True:
        finer = _ranks(
            [
                (
                    colours[i],
                    edges[i][i],
                    tuple(sorted((colours[j], edges[i][j], edges[j][i]) for j in nodes if j != i)),
                )
                for i in nodes
            ]
        )
        if len(set(finer)) == len(set(colours)):
            return finer
        colours = finer


def _ranks(values: Sequence[Any]) -> list[int]:
    """Each value's place among the distinct ones."""
    place = {value: i for i, value in enumerate(sorted(set(values)))}
    return [place[value] for value in values]


def _are_twins(a: int, b: int, edges: Matrix) -> bool:
    """Whether swapping two nodes of one colour changes nothing: then trying one is enough."""
    others = [k for k in range(len(edges)) if k not in (a, b)]
    return edges[a][b] == edges[b][a] and all(
        edges[a][k] == edges[b][k] and edges[k][a] == edges[k][b] for k in others
    )
