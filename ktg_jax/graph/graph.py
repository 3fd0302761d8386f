"""The description of a knowledge transfer graph: which networks, and the gate of every edge."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktg_jax.connectors import Connector
from ktg_jax.edge_arrays import PAPER_LOSSES, EdgeArrays, functions_among
from ktg_jax.errors import InputError
from ktg_jax.gates import gate_names
from ktg_jax.graph.canonical import canonical_order
from ktg_jax.graph.derived import PLAIN, Derived, derived_of
from ktg_jax.graph.edge import LABEL_LOSS, Edge, EdgeMatrix, checked_edges, matrix_shape
from ktg_jax.graph.node import LEARNING, Node
from ktg_jax.graph.node_checks import (
    check_number_of_nodes,
    checked_nodes,
    checked_temperature,
    node_from_json,
)
from ktg_jax.graph.normal_form import merged
from ktg_jax.graph.roles import check_roles
from ktg_jax.graph.stale import connectors_of, with_stale_senders
from ktg_jax.inputs import OF_DATA, resolved_input
from ktg_jax.io.files import write_text
from ktg_jax.io.json_input import check_fields, decoded, read


@dataclass(frozen=True, init=False)
class Graph:
    """An immutable, hashable, validated knowledge transfer graph. Node 0 is the *target*.

    Args:
        nodes: N nodes, 1 to 100; strings are taken as model names.
        gates: N x N; row = receiver, column = sender, diagonal = label edge. Each is a gate's name
            or an `Edge`, or an edge as JSON has it.
        temperature: the temperature of every edge that has none of its own, 1e-15 to 1e15.
        edges: (in place of the gates) N x N edges. Beside them, as `dataclasses.replace` gives
            them, a name among the gates changes an edge's gate and nothing else of it.

    Attributes:
        nodes: N nodes, each with a name.
        edges: N x N edges, `edges[receiver][sender]`.
        temperature: T > 0.
        derived: the nodes that are ensembles or averages of others.

    Raises:
        InputError: no node or more than 100, a gate or a loss that does not exist, a matrix of the
            wrong shape, two nodes of one name, a target with only cutoff gates, a frozen node with
            a prior or with options of learning, a recorded node that hears others or is to show its
            stages, a node of other classes that is the target or hears the label, an option of a
            node or of an edge that is out of range, or a temperature that is not a finite number
            above 0.

    >>> graph = Graph([Node("resnet32", "a"), Node("wrn28_2", "b")],
    ...               [["through", Edge("correct", weight=0.5)], ["cutoff", "cutoff"]])
    >>> graph.gates, graph.edges[0][1].losses
    ((('through', 'correct'), ('cutoff', 'cutoff')), {'kl': 0.5})
    >>> graph.frozen, graph.needed_nodes()
    ((1,), (0, 1))
    """

    nodes: tuple[Node, ...]
    edges: EdgeMatrix
    temperature: float
    derived: Derived = dataclasses.field(init=False, repr=False, compare=False)

    def __init__(
        self, nodes: Any, gates: Any = None, temperature: float = 1.0, *, edges: Any = None
    ) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this is where it is made
        set_field(self, "nodes", checked_nodes(nodes))
        if gates is None and edges is None:
            raise InputError("gates", None, matrix_shape(len(self.nodes)))
        matrix = None if edges is None else checked_edges("edges", edges, len(self.nodes))
        if gates is not None:
            matrix = checked_edges("gates", gates, len(self.nodes), matrix)
        set_field(self, "edges", matrix)
        set_field(self, "temperature", checked_temperature("temperature", temperature))
        check_roles(self.nodes, self.edges, self.frozen)
        set_field(self, "derived", derived_of(self.nodes, self.frozen))

    @property
    def gates(self) -> tuple[tuple[str, ...], ...]:
        """The N x N names of gates, `gates[receiver][sender]`."""
        return tuple(tuple(edge.gate for edge in row) for row in self.edges)

    @property
    def gate_codes(self) -> np.ndarray:
        """The gates as integer codes of `gate_names`: int32 `[N, N]`."""
        names = gate_names()
        return np.array([[names.index(gate) for gate in row] for row in self.gates], np.int32)

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that occur, the paper's first, the others in the order of their names."""
        found = {name for row in self.edges for edge in row for name in edge.losses}
        return (*PAPER_LOSSES, *sorted(found - set(PAPER_LOSSES)))

    @property
    def edge_arrays(self) -> EdgeArrays:
        """All edges as arrays, as `edge_losses` and `train_step` take them in place of gates."""
        moving = {each.node for each in self.derived.averages}
        edges, delayed = with_stale_senders(self.edges, set(self.frozen) - moving)
        weights = [
            [[edge.losses.get(name, 0.0) for edge in row] for row in edges] for name in self.losses
        ]
        temperatures = [
            [self.temperature if edge.temperature is None else edge.temperature for edge in row]
            for row in edges
        ]
        names = gate_names()
        gates = np.array([[names.index(edge.gate) for edge in row] for row in edges], np.int32)
        return EdgeArrays(
            gates,
            np.array(weights, np.float32),
            np.array(temperatures, np.float32),
            self.losses,
            functions_among(gates),
            connectors_of(self.nodes, edges, delayed),
            delayed,
        )

    @property
    def connectors(self) -> tuple[Connector, ...]:
        """The connectors of all edges that carry something."""
        return connectors_of(self.nodes, self.edges)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Indices of the nodes that never learn: all their incoming gates are cutoff."""
        return tuple(
            receiver
            for receiver, row in enumerate(self.gates)
            if all(gate == "cutoff" for gate in row)
        )

    def model_of(self, index: int) -> str:
        """The name of a node's model; of an average that of the node whose weights it averages."""
        sources = {each.node: each.source for each in self.derived.averages}
        return self.nodes[sources.get(index, index)].model

    def carrying(self, loss: str | Mapping[str, float]) -> "Graph":
        """This graph, its transfer edges carrying something else through the same gates.

        Args:
            loss: the name of a loss, or several with their weights, as of `Edge`.

        >>> graph = Graph(["cnn", "cnn"], [["through", "linear"], ["through", "through"]])
        >>> graph.carrying({"kl": 1.0, "attention": 1000.0}).edges[0][1].losses
        {'kl': 1.0, 'attention': 1000.0}
        """
        return self._with_losses(lambda edge, on_label: edge.loss if on_label else loss)

    def smoothed(self, smoothing: float) -> "Graph":
        """This graph, its label edges with smoothed labels where they carry the cross-entropy.

        Args:
            smoothing: the share of a label that goes to all classes alike, in [0, 1].

        >>> Graph(["cnn"], [["through"]]).smoothed(0.1).edges[0][0].losses
        {'smoothed_cross_entropy': 1.0}
        """
        smoothed = f"smoothed_cross_entropy(smoothing={smoothing})"
        return self._with_losses(
            lambda edge, on_label: smoothed if on_label and edge.loss == LABEL_LOSS else edge.loss
        )

    def _with_losses(self, loss_of: Callable[[Edge, bool], str | Mapping[str, float]]) -> "Graph":
        """The graph whose edges carry what is said for each, and whether it is a label edge."""
        edges = tuple(
            tuple(dataclasses.replace(e, loss=loss_of(e, s == t)) for s, e in enumerate(row))
            for t, row in enumerate(self.edges)
        )
        return dataclasses.replace(self, edges=edges)

    def needed_nodes(self, roots: Iterable[int] = (0,)) -> tuple[int, ...]:
        """The nodes that can influence a root: edges that carry something lead from them to it.

        So do ensembles from their members, and averages from what they average.

        Args:
            roots: node indices; they are needed themselves.

        Returns:
            Sorted indices.
        """
        roots = tuple(roots)
        for root in roots:
            if root not in range(len(self.nodes)):
                raise InputError("roots", root, f"node indices 0 to {len(self.nodes) - 1}")
        needed: set[int] = set()
        to_visit = set(roots)
        while to_visit:
            receiver = to_visit.pop()
            needed.add(receiver)
            senders = {s for s, edge in enumerate(self.edges[receiver]) if edge.carries}
            senders |= set(self.derived.of(receiver))
            to_visit |= senders - needed
        return tuple(sorted(needed))

    def pruned(self, roots: Iterable[int] = (0,)) -> "Graph":
        """This graph without the nodes that cannot influence a root.

        The target (and so every needed node) trains as it would have in the whole graph. Names
        are kept, and with them the initial weights; node 0 stays the target.
        """
        kept = self.needed_nodes({0, *roots})
        return dataclasses.replace(
            self,
            nodes=tuple(self.nodes[i] for i in kept),
            edges=tuple(tuple(self.edges[t][s] for s in kept) for t in kept),
        )

    def canonical(self) -> "Graph":
        """The one graph that stands for all those whose target trains in the same way.

        It is the same for graphs that differ by the numbering of nodes other than the target, by
        nodes that cannot influence the target, by frozen nodes that are one network (of the same
        model, weights and input, or one recording: what their edges weigh adds up), by
        `correct` in place of `through` on a label edge (the label is always right), by the
        temperature where no loss has one, by how an edge is written, and by names. Names choose
        only initial weights, so equivalent graphs train alike up to the seed. Models, weights,
        priors and all else count.

        Returns:
            The pruned graph, its nodes sorted and named `node0`, the target, `node1`, ...

        Raises:
            InputError: so many nodes look alike that it would take too long, never of up to 8; or
                ensembles or averages, for which no such form is defined.

        >>> graph = Graph(["resnet32", "wrn28_2", "cnn"], [["correct", "cutoff", "linear"],
        ...               ["through", "through", "through"], ["cutoff", "cutoff", "cutoff"]])
        >>> canonical = graph.canonical()  # the target hears node 2 alone; node 1 is left out
        >>> canonical.gates, canonical.nodes[1].model, canonical.nodes[1].name
        ((('through', 'linear'), ('cutoff', 'cutoff')), 'cnn', 'node1')
        """
        graph = self.pruned()
        if graph.derived != PLAIN:
            kinds_of = [node.kind for node in graph.nodes]
            raise InputError("nodes", kinds_of, "no ensembles or averages in a canonical graph")
        kinds = [
            (
                i != 0,
                node.model,
                node.weights is not None,
                node.weights or "",
                tuple(node.prior_options.values()),
                repr(_numbers_of(node.input)),
                node.outputs or "",
                repr([node.classes, *(getattr(node, field) for field in LEARNING)]),
            )
            for i, node in enumerate(graph.nodes)
        ]
        of, edges = merged(kinds, graph.frozen, graph.edges, graph.temperature)
        order = canonical_order([kinds[i] for i in of], _ranked(edges))
        matrix = [[edges[t][s] for s in order] for t in order]
        temperatures = {e.temperature for row in matrix for e in row} - {None}
        shared = temperatures.pop() if len(temperatures) == 1 else None
        if shared is not None:
            matrix = [[dataclasses.replace(e, temperature=None) for e in row] for row in matrix]
        nodes = [graph.nodes[of[i]] for i in order]
        return Graph(
            tuple(dataclasses.replace(n, name=f"node{i}") for i, n in enumerate(nodes)),
            edges=matrix,
            temperature=1.0 if shared is None else shared,
        )

    def equivalent(self, other: "Graph") -> bool:
        """Whether the target trains in the same way in both, up to the seed: see `canonical`.

        >>> pair = Graph(["cnn", "cnn"], [["through", "cutoff"], ["through", "linear"]])
        >>> pair.equivalent(Graph(["cnn"], [["correct"]]))  # the target hears only its label
        True
        """
        return self.canonical() == other.canonical()

    def to_json(self) -> str:
        """The graph as JSON text; an edge whose gate says all is the gate's name.

        `from_json` is its inverse.
        """
        nodes = [node.to_dict() for node in self.nodes]
        rows = [[edge.to_json() for edge in row] for row in self.edges]
        return json.dumps({"nodes": nodes, "gates": rows, "temperature": self.temperature})

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Graph":
        """A graph from JSON text, or from what it decodes to.

        Raises:
            InputError: not JSON or too much of it, an unknown field, one that is missing or there
                twice, or what `Graph` itself refuses.
        """
        fields = decoded("graph", text) if isinstance(text, str) else text
        check_fields("graph", fields, required={"nodes", "gates"}, optional={"temperature"})
        if not isinstance(fields["nodes"], list):
            raise InputError("nodes", fields["nodes"], "a list of nodes")
        check_number_of_nodes(len(fields["nodes"]))
        return cls(
            nodes=tuple(
                node_from_json(f"nodes[{i}]", node) for i, node in enumerate(fields["nodes"])
            ),
            gates=fields["gates"],
            temperature=fields.get("temperature", 1.0),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json`, indented, to a file."""
        write_text(path, json.dumps(json.loads(self.to_json()), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Graph":
        """Reads a graph from a JSON file, UTF-8 with or without a byte order mark.

        Raises:
            InputError: as `from_json`, and where the file is missing or unreadable.
        """
        return cls.from_json(read("graph", path))


def _numbers_of(given: Any) -> Any:
    """An input's numbers; of the data's own its name, and None where there is none."""
    return given if given in (None, OF_DATA) else resolved_input(given)


def _ranked(edges: Sequence[Sequence[Edge]]) -> list[list[int]]:
    """The edges as integers: equal ones the same, whatever the numbering of the nodes."""

    def key(edge: Edge) -> tuple[Any, ...]:
        losses = sorted(edge.losses.items())
        return edge.gate, losses, edge.temperature or 0.0, edge.connector or "", edge.delay

    listed = sorted(key(edge) for row in edges for edge in row)
    return [[listed.index(key(edge)) for edge in row] for row in edges]
