"""Edges in a form that two graphs share exactly where they train alike.

An edge is a sum of atoms: a loss at a temperature, times a gate's four numbers. Frozen nodes of the
same weights are one node, whose atoms add up; what no named gate says alone is carried by as many
copies of the node as it takes.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from ktg_jax.gates import gate_functions, gate_names, named_coefficients
from ktg_jax.graph.edge import LABEL_LOSS, Edge
from ktg_jax.named_losses import named_loss

Atom = tuple[str, float | None]
"""A loss, and the temperature if it has one."""

Sum = dict[Atom, dict[str, float]]
"""How much of each atom passes through each gate."""

EdgeMatrix = Sequence[Sequence[Edge]]


def sum_of(edges: Iterable[Edge], temperature: float, on_label: bool) -> Sum:
    """What some edges between the same nodes carry together; nothing has weight 0 in it.

    >>> sum_of([Edge("linear"), Edge("linear", temperature=2.0)], 2.0, on_label=False)
    {('kl', 2.0): {'linear': 2.0}}
    """
    total: Sum = defaultdict(lambda: defaultdict(float))
    for edge in edges:
        for loss, weight in edge.losses.items():
            of_edge = temperature if edge.temperature is None else edge.temperature
            atom = loss, of_edge if named_loss(loss).uses_temperature else None
            if weight and edge.gate != "cutoff":
                total[atom][edge.gate] += weight
    return {atom: _simplified(by_gate, on_label) for atom, by_gate in total.items()}


def edges_of(total: Sum) -> tuple[Edge, ...]:
    """The fewest edges that carry a sum, in an order of their own; none for the empty sum.

    >>> (edge,) = edges_of({("kl", 2.0): {"through": 1.0}, ("attention", None): {"through": 5.0}})
    >>> edge.gate, edge.losses, edge.temperature
    ('through', {'attention': 5.0, 'kl': 1.0}, 2.0)
    """
    groups: dict[tuple[str, float | None], dict[str, float]] = defaultdict(dict)
    with_temperature = {(g, atom[1]) for atom, by_gate in total.items() for g in by_gate if atom[1]}
    for (loss, temperature), by_gate in total.items():
        for gate, weight in by_gate.items():
            if temperature is None:  # beside a loss that has one, where there is such
                shared = (t for g, t in with_temperature if g == gate and t is not None)
                temperature_here = min(shared, default=None)
            else:
                temperature_here = temperature
            groups[gate, temperature_here][loss] = weight
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0.0))
    return tuple(_edge(gate, t, losses) for (gate, t), losses in ordered)


def merged(
    kinds: Sequence[Hashable], frozen: Iterable[int], edges: EdgeMatrix, temperature: float
) -> tuple[list[int], list[list[Edge]]]:
    """The graph's nodes and edges, those that are alike merged.

    Args:
        kinds: what each of the N nodes is; frozen nodes of one kind are the same network.
        frozen: indices of the nodes that never learn.
        edges: N x N, [receiver][sender].
        temperature: the temperature of edges that have none of their own.

    Returns:
        The old index of each new node (that of a frozen node as often as it takes), the target
        first, and the edges between the new nodes; losses have their temperatures.
    """
    frozen = set(frozen)
    nodes = range(len(kinds))
    # What is heard by way of two connectors is not twice what is heard by way of one.
    apart = {i for i in nodes if any(_is_special(row[i]) for row in edges)}
    groups = [[i] for i in nodes if i not in frozen]
    of_kind: dict[Hashable, list[int]] = defaultdict(list)
    for i in sorted(frozen):
        of_kind[i if i in apart else ("", kinds[i])].append(i)
    groups += of_kind.values()

    def carried(receiver: int, senders: Sequence[int]) -> tuple[Edge, ...]:
        on_label = receiver in senders
        (edge, *_) = (edges[receiver][s] for s in senders)
        if _is_special(edge):
            (whole,) = edges_of(sum_of([edge], temperature, on_label)) or (edge,)
            return (dataclasses.replace(whole, connector=edge.connector, delay=edge.delay),)
        return edges_of(sum_of((edges[receiver][s] for s in senders), temperature, on_label))

    learning = [i for i in nodes if i not in frozen]
    parts = {(t, g): carried(t, group) for t in learning for g, group in enumerate(groups)}
    copies = [max([1, *(len(parts[t, g]) for t in learning)]) for g in range(len(groups))]
    order = [(g, copy) for g, count in enumerate(copies) for copy in range(count)]
    rows = [
        [
            _part(parts.get((groups[t][0], g), ()), copy, on_label=i == j)
            for j, (g, copy) in enumerate(order)
        ]
        for i, (t, _) in enumerate(order)
    ]
    for i, (t, _) in enumerate(order):
        if groups[t][0] not in frozen and all(edge.gate == "cutoff" for edge in rows[i]):
            rows[i][i] = Edge("through", LABEL_LOSS, 0.0)  # it learns, though nothing
    return [groups[g][0] for g, _ in order], rows


def _is_special(edge: Edge) -> bool:
    """Whether an edge carries something by way of a connector, or late."""
    return edge.carries and bool(edge.connector or edge.delay)


def _part(parts: Sequence[Edge], copy: int, on_label: bool) -> Edge:
    if copy < len(parts):
        return parts[copy]
    return Edge("cutoff", LABEL_LOSS) if on_label else Edge("cutoff")


def _edge(gate: str, temperature: float | None, losses: Mapping[str, float]) -> Edge:
    names = sorted(losses)
    if len(names) == 1:
        return Edge(gate, names[0], losses[names[0]], temperature)
    return Edge(gate, {name: losses[name] for name in names}, 1.0, temperature)


def _simplified(by_gate: Mapping[str, float], on_label: bool) -> dict[str, float]:
    """The same through the fewest gates: one, or a sum of the papers'."""
    functions = gate_functions()
    kept = {gate: weight for gate, weight in by_gate.items() if gate in functions}
    known = {gate: weight for gate, weight in by_gate.items() if gate not in functions}
    a, b, c, d = (
        float(sum(weight * named_coefficients(gate)[i] for gate, weight in known.items()))
        for i in range(4)
    )
    if on_label:  # the label is always right
        a, b, c, d = a + c, b + d, 0.0, 0.0
    for gate in gate_names():
        if gate in functions or gate == "cutoff":
            continue
        numbers = np.array(named_coefficients(gate))
        weight = float(np.array([a, b, c, d]) @ numbers / (numbers @ numbers))
        if weight > 0 and np.allclose(weight * numbers, (a, b, c, d), rtol=1e-12, atol=1e-12):
            return kept | {gate: round(weight, 12)}
    if d != 0 or on_label:  # a label edge stays one edge
        return kept | dict(sorted(known.items()))
    falling = max(-b, 0.0)
    parts = {
        "through": a - falling,
        "linear": max(b, 0.0),
        "correct": c,
        "negative_linear": falling,
    }
    return kept | {gate: round(w, 12) for gate, w in parts.items() if round(w, 12) > 0}
