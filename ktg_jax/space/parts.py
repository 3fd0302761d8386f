"""What drawing and counting graphs need to know of a space, and the names of its choices."""

from collections.abc import Mapping
from typing import Any, Protocol


class Parts(Protocol):
    """A space of graphs; `SearchSpace` says what each of these is."""

    @property
    def num_nodes(self) -> int:
        """Nodes of a graph, the target included."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Models of the other nodes."""

    @property
    def gates(self) -> tuple[str, ...]:
        """Gates of an edge."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures of a graph."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a node beside the target may be: candidates and teachers."""

    def is_teacher(self, kind: str) -> bool:
        """Whether it is a teacher."""

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """What is chosen, by name."""


def gate_name(receiver: int, sender: int) -> str:
    """The name of the choice of an edge's gate."""
    return f"gate.{receiver}.{sender}"


def kind_name(node: int) -> str:
    """The name of the choice of what a node is."""
    return f"node{node}.model"


def hears(parameters: Mapping[str, Any], receiver: int, num_nodes: int) -> bool:
    """Whether a node hears anybody, the label included."""
    return any(parameters[gate_name(receiver, s)] != "cutoff" for s in range(num_nodes))
