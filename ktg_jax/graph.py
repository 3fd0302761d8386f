"""The description of a knowledge transfer graph: which networks, and the gate of every edge."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktg_jax.equivalence import canonical_order
from ktg_jax.errors import InputError
from ktg_jax.files import write_text
from ktg_jax.gates import GATES
from ktg_jax.graph_node import (
    NO_PRIOR,
    PRIOR_DEFAULTS,
    Node,
    check_number_of_nodes,
    checked_nodes,
    checked_number,
    checked_temperature,
)
from ktg_jax.json_input import check_fields, decoded, read
from ktg_jax.stage_losses import EdgeWeights

_EDGE_WEIGHTS = {"kl_weight": 1.0, "attention_weight": 0.0, "feature_weight": 0.0}
"""The fields that say what transfer edges carry, with the paper's values."""


@dataclass(frozen=True)
class Graph:
    """An immutable, hashable, validated knowledge transfer graph. Node 0 is the *target*.

    Attributes:
        nodes: N nodes, 1 to 100; strings are taken as model names.
        gates: N x N gate names; row = receiver, column = sender, diagonal = label edge.
        temperature: of every transfer edge, 1e-15 to 1e15.
        kl_weight: every transfer edge carries this times the divergence of logits (the paper: 1),
        attention_weight: this times the attention transfer loss,
        feature_weight: and this times the feature transfer loss (`ktg_jax.stage_losses`); each
            0 to 1e30.

    Raises:
        InputError: no node or more than 100, a gate that does not exist, a matrix of the wrong
            shape, two nodes of one name, a target with only cutoff gates, a frozen node with a
            prior or another one with a projection, an option of a node that is out of range, a
            temperature that is not a finite number above 0, or a bad weight.

    >>> graph = Graph([Node("resnet32", "a"), Node("wrn28_2", "b")],
    ...               [["through", "correct"], ["cutoff", "cutoff"]])
    >>> graph.frozen, graph.needed_nodes()
    ((1,), (0, 1))
    """

    nodes: tuple[Node, ...]
    gates: tuple[tuple[str, ...], ...]
    temperature: float = 1.0
    kl_weight: float = 1.0
    attention_weight: float = 0.0
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this is its one normalisation
        set_field(self, "nodes", checked_nodes(self.nodes))
        set_field(self, "gates", _checked_gates(self.gates, len(self.nodes)))
        set_field(self, "temperature", checked_temperature("temperature", self.temperature))
        for field in _EDGE_WEIGHTS:
            set_field(self, field, checked_number(field, getattr(self, field)))
        if 0 in self.frozen:
            raise InputError(
                "gates[0]",
                list(self.gates[0]),
                "at least one gate of the target (row 0) that is not cutoff",
            )
        for i, node in enumerate(self.nodes):
            if i in self.frozen and node.prior is not None:
                allowed = "no prior: all gates of the node are cutoff, it never learns"
                raise InputError(f"nodes[{i}].prior", node.prior, allowed)
            if i not in self.frozen and node.projection is not None:
                allowed = "no projection: the node learns, readers are fitted to one that does not"
                raise InputError(f"nodes[{i}].projection", node.projection, allowed)

    @property
    def gate_codes(self) -> np.ndarray:
        """The gates as integer codes of `GATES`: int32 `[N, N]`."""
        return np.array([[GATES.index(gate) for gate in row] for row in self.gates], np.int32)

    @property
    def edge_weights(self) -> EdgeWeights:
        """What transfer edges carry."""
        return EdgeWeights(self.kl_weight, self.attention_weight, self.feature_weight)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Indices of the nodes that never learn: all their incoming gates are cutoff."""
        return tuple(
            receiver
            for receiver, row in enumerate(self.gates)
            if all(gate == "cutoff" for gate in row)
        )

    def needed_nodes(self, roots: Iterable[int] = (0,)) -> tuple[int, ...]:
        """The nodes that can influence a root: a path of non-cutoff edges leads from them to it.

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
            senders = {s for s, gate in enumerate(self.gates[receiver]) if gate != "cutoff"}
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
            gates=tuple(tuple(self.gates[t][s] for s in kept) for t in kept),
        )

    def canonical(self) -> "Graph":
        """The one graph that stands for all those whose target trains in the same way.

        It is the same for graphs that differ by the numbering of nodes other than the target, by
        nodes that cannot influence the target, by `correct` in place of `through` on a label edge
        (the label is always right), by the temperature and the weights of losses where nothing is
        transferred, and by names. Names choose only initial weights, so equivalent graphs train
        alike up to the seed. Models, weights, priors and all other gates count.

        Returns:
            The pruned graph, its nodes sorted and named `node0`, the target, `node1`, ...

        Raises:
            InputError: so many nodes look alike that it would take too long; never of up to 8.

        >>> graph = Graph(["resnet32", "wrn28_2", "cnn"], [["correct", "cutoff", "linear"],
        ...               ["through", "through", "through"], ["cutoff", "cutoff", "cutoff"]])
        >>> canonical = graph.canonical()  # the target hears node 2 alone; node 1 is left out
        >>> canonical.gates, canonical.nodes[1].model, canonical.nodes[1].name
        ((('through', 'linear'), ('cutoff', 'cutoff')), 'cnn', 'node1')
        """
        graph = self.pruned()
        codes = graph.gate_codes.tolist()
        for i, row in enumerate(codes):
            if GATES[row[i]] == "correct":
                row[i] = GATES.index("through")
        kinds = [
            (
                i != 0,
                node.model,
                node.weights is not None,
                node.weights or "",
                tuple(node.prior_options.values()),
                node.projection or "",
            )
            for i, node in enumerate(graph.nodes)
        ]
        order = canonical_order(kinds, codes)
        nodes = [graph.nodes[i] for i in order]
        fields = ("temperature", *_EDGE_WEIGHTS) if len(order) > 1 else ()
        return Graph(
            nodes=tuple(dataclasses.replace(n, name=f"node{i}") for i, n in enumerate(nodes)),
            gates=tuple(tuple(GATES[codes[t][s]] for s in order) for t in order),
            **{field: getattr(self, field) for field in fields},
        )

    def equivalent(self, other: "Graph") -> bool:
        """Whether the target trains in the same way in both, up to the seed: see `canonical`.

        >>> pair = Graph(["cnn", "cnn"], [["through", "cutoff"], ["through", "linear"]])
        >>> pair.equivalent(Graph(["cnn"], [["correct"]]))  # the target hears only its label
        True
        """
        return self.canonical() == other.canonical()

    def to_json(self) -> str:
        """The graph as JSON text, weights of losses only where they are not the paper's.

        `from_json` is its inverse.
        """
        nodes = [node.to_dict() for node in self.nodes]
        rows = [list(row) for row in self.gates]
        content = {"nodes": nodes, "gates": rows, "temperature": self.temperature}
        weights = {field: getattr(self, field) for field in _EDGE_WEIGHTS}
        return json.dumps(content | {f: w for f, w in weights.items() if w != _EDGE_WEIGHTS[f]})

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Graph":
        """A graph from JSON text, or from what it decodes to.

        Raises:
            InputError: not JSON or too much of it, an unknown field, one that is missing or there
                twice, or what `Graph` itself refuses.
        """
        fields = decoded("graph", text) if isinstance(text, str) else text
        optional = {"temperature", *_EDGE_WEIGHTS}
        check_fields("graph", fields, required={"nodes", "gates"}, optional=optional)
        if not isinstance(fields["nodes"], list):
            raise InputError("nodes", fields["nodes"], "a list of nodes")
        check_number_of_nodes(len(fields["nodes"]))
        return cls(
            nodes=tuple(_node(f"nodes[{i}]", node) for i, node in enumerate(fields["nodes"])),
            gates=fields["gates"],
            **{field: fields[field] for field in optional if field in fields},
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


def _checked_gates(gates: Any, num_nodes: int) -> tuple[tuple[str, ...], ...]:
    """Checks that the gates are an N x N matrix of gate names."""

    def is_row(row: Any) -> bool:
        return isinstance(row, Sequence | np.ndarray) and not isinstance(row, str)

    shape = f"{num_nodes} rows of {num_nodes} gates (one row and one column a node)"
    if not is_row(gates) or len(gates) != num_nodes:
        raise InputError("gates", gates, shape)
    for receiver, row in enumerate(gates):
        if not is_row(row) or len(row) != num_nodes:
            raise InputError(f"gates[{receiver}]", row, shape)
        for sender, gate in enumerate(row):
            if not isinstance(gate, str) or gate not in GATES:
                raise InputError(f"gates[{receiver}][{sender}]", gate, ", ".join(GATES))
    return tuple(tuple(str(gate) for gate in row) for row in gates)


def _node(where: str, fields: Any) -> Node:
    """A node from JSON; options of a prior are refused where there is none, defaults or not."""
    optional = {"name", "weights", "prior", "projection", *PRIOR_DEFAULTS}
    check_fields(where, fields, required={"model"}, optional=optional)
    if fields.get("prior") is None:
        for field in PRIOR_DEFAULTS:
            if field in fields:
                raise InputError(f"{where}.{field}", fields[field], NO_PRIOR)
    return Node(**fields)
