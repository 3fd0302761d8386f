"""The space of graphs that a search draws from, as in the search of KTG's authors."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np

from ktg_jax.checks import is_whole
from ktg_jax.choices import (
    checked_gates,
    checked_losses,
    checked_temperatures,
    checked_weights,
    distinct,
)
from ktg_jax.errors import InputError
from ktg_jax.gates import GATES
from ktg_jax.graph.edge import TRANSFER_LOSS, Edge
from ktg_jax.graph.graph import Graph
from ktg_jax.graph.node import Node
from ktg_jax.graph.node_checks import MOST_NODES
from ktg_jax.models import check_model
from ktg_jax.space import draws, size
from ktg_jax.space.parts import gate_name, kind_name
from ktg_jax.space.teachers import checked_teachers, same_network

_OF_EDGES: dict[str, tuple[Any, ...]] = {
    "losses": (TRANSFER_LOSS,),
    "weights": (1.0,),
    "edge_temperatures": (),
}
"""The fields of what is chosen for edges beside their gates, as the papers have them."""

_LARGEST = 7
"""Nodes of the papers' largest graphs."""


@dataclass(frozen=True)
class SearchSpace:
    """All valid graphs of so many nodes: the target's model is given, all else is chosen.

    Each other node's model is one of the candidates, or the node is one of the teachers, which are
    trained already and never learn; each of the N^2 edges, label edges included, has one of the
    gates; all transfer edges share one of the temperatures, unless each has one of its own; each
    carries one of the losses, times one of the weights. A graph is valid where at least one gate
    of the target is not cutoff, and all gates of a teacher are. The papers' spaces have the first
    four gates, edges that carry the divergence, and no teachers.

    Attributes:
        num_nodes: N, the target included.
        target: the model of node 0.
        candidates: models of the other nodes; may be empty where there are none.
        gates: names of gates.
        temperatures: the temperatures of the transfer edges, one a graph.
        losses: names of losses of transfer edges, or several with their weights, as of `Edge`; one
            an edge.
        weights: the weights of transfer edges, one an edge.
        edge_temperatures: the temperatures of transfer edges, one an edge, in place of one a graph;
            none: that one.
        teachers: nodes with weights or outputs, each with a name that no candidate has.
        allow_large: (not kept) accepts more than 7 nodes, up to 100.

    Raises:
        InputError: fewer than 1 or more than 7 nodes, an unknown model or gate, something twice,
            a temperature that no graph may have, teachers where no gate is cutoff, a node that is
            no teacher, or a space without a valid graph.

    >>> space = SearchSpace(3, "resnet32", ("resnet32", "resnet110", "wrn28_2"))
    >>> space.size(), space.size(up_to_equivalence=True)
    (2322432, 420878)
    >>> graph = space.sample(np.random.default_rng(0))
    >>> graph.nodes[0].model, space.graph(space.parameters(graph)) == graph
    ('resnet32', True)
    """

    num_nodes: int
    target: str
    candidates: tuple[str, ...]
    gates: tuple[str, ...] = GATES[:4]
    temperatures: tuple[float, ...] = (1.0,)
    losses: tuple[str | Mapping[str, float], ...] = (TRANSFER_LOSS,)
    weights: tuple[float, ...] = (1.0,)
    edge_temperatures: tuple[float, ...] = ()
    teachers: tuple[Node, ...] = ()
    allow_large: InitVar[bool] = False

    def __post_init__(self, allow_large: bool) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this is its one normalisation
        _check_num_nodes(self.num_nodes, allow_large)
        check_model(self.target, "target")
        set_field(self, "candidates", distinct("candidates", self.candidates))
        for i, model in enumerate(self.candidates):
            check_model(model, f"candidates[{i}]")
        set_field(self, "gates", checked_gates(self.gates))
        set_field(self, "teachers", checked_teachers(self.teachers, self.candidates, self.gates))
        if self.num_nodes > 1 and not (self.candidates or self.teachers):
            allowed = "at least one model or teacher for the nodes beside the target"
            raise InputError("candidates", [], allowed)
        for field, least in (("temperatures", 1), ("edge_temperatures", 0)):
            set_field(self, field, checked_temperatures(field, getattr(self, field), least))
        set_field(self, "weights", checked_weights(self.weights))
        set_field(self, "losses", checked_losses(self.losses))
        if self.edge_temperatures and self.temperatures != (1.0,):
            allowed = "(1.0,): each edge has a temperature of its own"
            raise InputError("temperatures", list(self.temperatures), allowed)

    def sample(self, rng: np.random.Generator, draw: str = "uniform") -> Graph:
        """Draws a graph.

        Args:
            rng: a NumPy generator, which is advanced.
            draw: `uniform`: each valid graph of a space without teachers with the same probability,
                as the papers draw; with teachers, first each node's model, then the gates that it
                may have. `roles`: first what each node beside the target is (absent, learning or
                frozen), then its model, then the gates between those that are there; so a frozen
                teacher is as likely as a partner.

        Raises:
            InputError: `rng` is not such a generator, or another way to draw.

        >>> space = SearchSpace(3, "cnn", ("cnn",))
        >>> graphs = [space.sample(np.random.default_rng(seed), "roles") for seed in range(100)]
        >>> any(i in graph.frozen for graph in graphs for i in graph.needed_nodes())
        True
        """
        if not isinstance(rng, np.random.Generator):
            raise InputError("rng", rng, "a numpy.random.Generator")
        return self.graph(draws.drawn(self, rng, draw))

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """What is chosen, by name: `node1.model`, `gate.<receiver>.<sender>` and `temperature`.

        Where there is a choice, also `loss.<receiver>.<sender>` (several losses as JSON text),
        `weight.<receiver>.<sender>` and `temperature.<receiver>.<sender>`.
        """
        nodes = range(self.num_nodes)
        pairs = [(t, s) for t in nodes for s in nodes if t != s]
        return {
            **{kind_name(i): self.kinds for i in nodes[1:]},
            **{gate_name(t, s): self.gates for t in nodes for s in nodes},
            **{
                f"{what}.{t}.{s}": allowed
                for what, allowed in self._edge_choices().items()
                for t, s in pairs
            },
            "temperature": self.temperatures,
        }

    def _edge_choices(self) -> dict[str, tuple[Any, ...]]:
        """What is chosen for each transfer edge beside its gate."""
        of_edge = {
            "loss": tuple(map(_written, self.losses)),
            "weight": self.weights,
            "temperature": self.edge_temperatures,
        }
        return {what: allowed for what, allowed in of_edge.items() if len(allowed) > 1}

    def _edge(self, parameters: Mapping[str, Any], receiver: int, sender: int) -> Edge | str:
        gate = parameters[gate_name(receiver, sender)]
        if receiver == sender:
            return gate
        pair = f"{receiver}.{sender}"
        only = self.edge_temperatures[0] if self.edge_temperatures else None
        return Edge(
            gate,
            self._loss(parameters.get(f"loss.{pair}")),
            parameters.get(f"weight.{pair}", self.weights[0]),
            parameters.get(f"temperature.{pair}", only),
        )

    def _loss(self, written: str | None) -> str | Mapping[str, float]:
        return next(loss for loss in self.losses if written in (None, _written(loss)))

    def _edge_parameters(self, graph: Graph) -> dict[str, Any]:
        """The choices that make the edges of a graph, their gates apart."""
        chosen = self._edge_choices()
        parameters: dict[str, Any] = {}
        for t, row in enumerate(graph.edges):
            for s, edge in enumerate(row):
                found = {
                    "loss": _written(edge.loss) if edge.loss in self.losses else None,
                    "weight": edge.weight if edge.weight in self.weights else None,
                    "temperature": edge.temperature,
                }
                temperatures: tuple[Any, ...] = self.edge_temperatures or (None,)
                fits = None not in (found["loss"], found["weight"])
                if t == s and not edge.is_plain:
                    raise InputError(f"gates[{t}][{s}]", edge.to_json(), "a gate, on a label edge")
                if t != s and not (fits and edge.temperature in temperatures):
                    raise InputError(f"gates[{t}][{s}]", edge.to_json(), "an edge of the space")
                if t != s:
                    parameters |= {f"{what}.{t}.{s}": found[what] for what in chosen}
        return parameters

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a node beside the target may be: the candidates, and the teachers' names."""
        return (*self.candidates, *(str(teacher.name) for teacher in self.teachers))

    def is_teacher(self, kind: str) -> bool:
        """Whether a choice of `kinds` is a teacher."""
        return kind not in self.candidates

    def parameters(self, graph: Graph) -> dict[str, Any]:
        """The choices that make a graph; `graph` is the inverse, but for the nodes' names.

        Raises:
            InputError: the graph is not of this space; names the first thing that is not.
        """
        if len(graph.nodes) != self.num_nodes:
            raise InputError("nodes", len(graph.nodes), f"{self.num_nodes} nodes, as in the space")
        if self._kind(0, graph.nodes[0]) != self.target:
            raise InputError("nodes[0].model", graph.nodes[0].model, f"the target, {self.target}")
        parameters = {
            **{kind_name(i): self._kind(i, node) for i, node in enumerate(graph.nodes) if i > 0},
            **{
                gate_name(receiver, sender): gate
                for receiver, row in enumerate(graph.gates)
                for sender, gate in enumerate(row)
            },
            **self._edge_parameters(graph),
            "temperature": graph.temperature,
        }
        self._check(parameters)
        return parameters

    def _kind(self, index: int, node: Node) -> str:
        """Which of `kinds` a node is, or the name of a model that is none of them."""
        for teacher in self.teachers:
            if same_network(node, teacher):
                return str(teacher.name)
        for field in ("weights", "prior", "outputs"):
            if getattr(node, field) is not None:
                allowed = f"no {field} in the space"
                raise InputError(f"nodes[{index}].{field}", getattr(node, field), allowed)
        return node.model

    def _node(self, index: int, kind: str) -> Node:
        for teacher in self.teachers:
            if kind == teacher.name:
                return dataclasses.replace(teacher, name=f"{kind}-{index}")
        return Node(kind)

    def graph(self, parameters: Mapping[str, Any]) -> Graph:
        """The graph of these choices; nodes are named by what they are and their index.

        Only teachers have weights.

        Raises:
            InputError: a choice is missing, unknown or not of this space, or the graph is invalid.
        """
        self._check(parameters)
        nodes = range(self.num_nodes)
        others = (self._node(i, parameters[kind_name(i)]) for i in nodes[1:])
        return Graph(
            nodes=(Node(self.target), *others),
            gates=tuple(tuple(self._edge(parameters, t, s) for s in nodes) for t in nodes),
            temperature=parameters["temperature"],
        )

    def size(self, up_to_equivalence: bool = False) -> int:
        """The number of valid graphs.

        Args:
            up_to_equivalence: counts graphs with the same `Graph.canonical` once.

        Raises:
            InputError: equivalent graphs of more than 3 nodes, with teachers or with a choice of
                what edges carry, which it cannot count.
        """
        if not up_to_equivalence:
            of_edge = math.prod(len(allowed) for allowed in self._edge_choices().values())
            return size.valid(self, of_edge)
        for field, papers in _OF_EDGES.items():
            if getattr(self, field) != papers:
                allowed = f"{papers}, to count equivalent graphs"
                raise InputError(field, getattr(self, field), allowed)
        return size.classes(self)

    def describe(self) -> dict[str, Any]:
        """The space as what JSON can hold, by field: kept with a study, compared with the next.

        What is chosen for edges beside their gates is left out where it is the papers', as are
        teachers where there are none.

        >>> SearchSpace(1, "cnn", (), ("through", "linear")).describe() == {
        ...     "num_nodes": 1, "target": "cnn", "candidates": [], "gates": ["through", "linear"],
        ...     "temperatures": [1.0]}
        True
        """
        plain = {
            "num_nodes": self.num_nodes,
            "target": self.target,
            "candidates": list(self.candidates),
            "gates": list(self.gates),
            "temperatures": list(self.temperatures),
        }
        of_edges = {field: getattr(self, field) for field in _OF_EDGES}
        plain |= {f: list(value) for f, value in of_edges.items() if value != _OF_EDGES[f]}
        teachers = [teacher.to_dict() for teacher in self.teachers]
        return plain | ({"teachers": teachers} if teachers else {})

    def differing(self, description: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields in which another space's description differs; the order of choices counts.

        >>> space = SearchSpace(1, "cnn", ())
        >>> space.differing(SearchSpace(1, "resnet8", (), temperatures=(1, 4)).describe())
        ('target', 'temperatures')
        """
        own = self.describe()
        fields = {**own, **description}
        return tuple(field for field in fields if own.get(field) != description.get(field))

    def _check(self, parameters: Mapping[str, Any]) -> None:
        """Checks that the parameters are exactly the choices, each with an allowed value."""
        choices = self.choices()
        for name, allowed in choices.items():
            if name not in parameters:
                raise InputError("parameters", f"no {name}", ", ".join(choices))
            if parameters[name] not in allowed:
                raise InputError(name, parameters[name], ", ".join(map(str, allowed)))
        for name in parameters:
            if name not in choices:
                raise InputError("parameters", name, ", ".join(choices))
        for i in range(1, self.num_nodes):
            kind = parameters[kind_name(i)]
            heard = (gate_name(i, sender) for sender in range(self.num_nodes))
            taught = [name for name in heard if parameters[name] != "cutoff"]
            if taught and self.is_teacher(kind):
                expected = f"cutoff: {kind} is a teacher and never learns"
                raise InputError(taught[0], parameters[taught[0]], expected)


def _written(loss: str | Mapping[str, float]) -> str:
    return loss if isinstance(loss, str) else json.dumps(dict(loss), sort_keys=True)


def _check_num_nodes(num_nodes: Any, allow_large: bool) -> None:
    most = MOST_NODES if allow_large else _LARGEST
    if not (is_whole(num_nodes, 1) and num_nodes <= most):
        more = "" if allow_large else ", or more with allow_large=True"
        raise InputError("num_nodes", num_nodes, f"1 to {most} nodes{more}")
