"""Senders that are heard late: for each delay a sender of its own, behind the nodes."""

from collections.abc import Collection, Sequence

from ktg_jax.connectors import Connector
from ktg_jax.edge_arrays import Delayed
from ktg_jax.graph.edge import LABEL_LOSS, Edge
from ktg_jax.graph.node import Node


def with_stale_senders(
    edges: Sequence[Sequence[Edge]], changeless: Collection[int]
) -> tuple[list[list[Edge]], tuple[Delayed, ...]]:
    """The edges, each late one moved to the column of a sender of its own; and these senders.

    Args:
        edges: N x N, [receiver][sender].
        changeless: indices of the nodes that never change.

    >>> now, late = Edge(), Edge(delay=3)
    >>> edges, delayed = with_stale_senders([[now, late], [now, now]], ())
    >>> delayed, [edge.gate for edge in edges[0]]
    ((Delayed(sender=1, delay=3, changes=True),), ['through', 'cutoff', 'through'])
    """
    number = len(edges)
    columns: dict[tuple[int, int], int] = {}
    for row in edges:
        for s, edge in enumerate(row):
            if edge.delay and edge.carries:
                columns.setdefault((s, edge.delay), number + len(columns))
    size = number + len(columns)
    moved = [[Edge("cutoff", LABEL_LOSS, 0.0)] * size for _ in range(size)]
    for t, row in enumerate(edges):
        for s, edge in enumerate(row):
            moved[t][columns.get((s, edge.delay), s) if edge.carries else s] = edge
    return moved, tuple(Delayed(s, delay, s not in changeless) for s, delay in columns)


def connectors_of(
    nodes: Sequence[Node], edges: Sequence[Sequence[Edge]], delayed: Sequence[Delayed] = ()
) -> tuple[Connector, ...]:
    """The connectors of edges that carry something.

    Args:
        nodes: of the graph.
        edges: [receiver][sender]; after the nodes' columns are those of stale senders.
        delayed: these.
    """
    senders = [*range(len(nodes)), *(each.sender for each in delayed)]
    return tuple(
        Connector(t, s, str(nodes[senders[s]].name), tuple(edge.connector.split("+")))
        for t, row in enumerate(edges)
        for s, edge in enumerate(row)
        if edge.connector is not None and edge.carries
    )
