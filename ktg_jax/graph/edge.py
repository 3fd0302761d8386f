"""The description of an edge: its gate, and what it carries."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ktg_jax.connectors import CONNECTORS, connector_kinds
from ktg_jax.errors import InputError, did_you_mean
from ktg_jax.gates import gate_names
from ktg_jax.graph.node_checks import checked_number, checked_temperature
from ktg_jax.io.json_input import check_fields
from ktg_jax.named_losses import checked_loss, loss_names, named_loss

LABEL_LOSS = "cross_entropy"
TRANSFER_LOSS = "kl"
MOST_DELAY = 10_000
"""The largest delay: what is said is kept for so many updates."""


@dataclass(frozen=True)
class Edge:
    """An edge: through which gate it carries which losses.

    Attributes:
        gate: the name of a gate.
        loss: the name of a loss, or several with the weight of each; options stand behind the
            name, `decoupled_kl(beta=2)`. Of a label edge `kl` stands for `cross_entropy`, which a
            label edge carries unless it is said otherwise.
        weight: the weight of all that the edge carries; finite, not negative.
        temperature: T > 0 of the losses that have one; None: the graph's.
        connector: what is put behind the receiver, and trained with it, where its ends do not fit:
            `conv` or `conv_conv` (1x1 convolutions) behind its stages, `linear` or `linear_linear`
            behind its logits, or one of each as `conv+linear`. None: nothing.
        delay: how many updates ago the sender was as it is heard; in the first ones the edge is as
            good as cut. 0: it is heard as it is now.

    >>> Edge("linear", {"kl": 1, "attention": 1000}, temperature=4.0).losses
    {'kl': 1.0, 'attention': 1000.0}
    >>> Edge(weight=0.5).losses
    {'kl': 0.5}
    """

    gate: str = "through"
    loss: "str | Mapping[str, float]" = TRANSFER_LOSS
    weight: float = 1.0
    temperature: float | None = None
    connector: str | None = None
    delay: int = 0

    def __hash__(self) -> int:
        losses = tuple(sorted(self.losses.items()))
        return hash((self.gate, losses, self.temperature, self.connector))

    @property
    def losses(self) -> dict[str, float]:
        """Each loss that the edge carries, with its weight times the edge's."""
        parts = self.loss if isinstance(self.loss, Mapping) else {self.loss: 1.0}
        return {name: self.weight * weight for name, weight in parts.items()}

    @property
    def carries(self) -> bool:
        """Whether anything can reach the receiver: the edge is not cut, and weighs something."""
        return self.gate != "cutoff" and any(self.losses.values())

    @property
    def is_plain(self) -> bool:
        """Whether the gate says all: it carries what the paper's edges do."""
        return self == Edge(self.gate) or self == Edge(self.gate, LABEL_LOSS)

    @property
    def says(self) -> str:
        """What the edge carries, in words for people; empty where the gate says all.

        >>> Edge("linear", {"kl": 1, "attention": 1000}, temperature=4).says, Edge().says
        ('kl + 1000 attention, T 4', '')
        >>> Edge(delay=50).says
        'kl, 50 updates late'
        """
        if self.is_plain:
            return ""
        parts = [n if w == 1 else f"{w:g} {n}" for n, w in self.losses.items()]
        at = "" if self.temperature is None else f", T {self.temperature:g}"
        by = "" if self.connector is None else f", by {self.connector}"
        late = f", {self.delay} updates late" if self.delay else ""
        return " + ".join(parts) + at + by + late

    def to_json(self) -> Any:
        """The gate's name where it says all, else an object of the fields that are not default."""
        if self.is_plain:
            return self.gate
        loss = self.loss if isinstance(self.loss, str) else dict(self.loss)
        fields: dict[str, Any] = {"gate": self.gate, "loss": loss}
        fields |= {"weight": self.weight} if self.weight != 1 else {}
        fields |= {} if self.temperature is None else {"temperature": self.temperature}
        fields |= {} if self.connector is None else {"connector": self.connector}
        return fields | ({"delay": self.delay} if self.delay else {})


EdgeMatrix: TypeAlias = tuple[tuple[Edge, ...], ...]

_FIELDS = tuple(field.name for field in dataclasses.fields(Edge))


def checked_edge(where: str, given: Any, on_label: bool) -> Edge:
    """An edge from a gate's name, from an object of its fields, or as it is; checked.

    Args:
        where: it stands, for errors: `gates[0][1]`.
        given: what is there.
        on_label: whether it is a label edge.

    Raises:
        InputError: names the first field that is wrong.

    >>> checked_edge("gates[0][0]", "linear", on_label=True)
    Edge(gate='linear', loss='cross_entropy', weight=1.0, temperature=None, connector=None, delay=0)
    """
    default = LABEL_LOSS if on_label else TRANSFER_LOSS
    if isinstance(given, str):
        return Edge(_checked_gate(where, given), default)
    if isinstance(given, Mapping):
        check_fields(where, given, required=(), optional=_FIELDS)
        given = Edge(**{"loss": default, **given})
    elif not isinstance(given, Edge):
        raise InputError(where, given, f"{', '.join(gate_names())}, or an object of an edge")
    elif on_label and given.loss == TRANSFER_LOSS:
        given = dataclasses.replace(given, loss=default)
    temperature = given.temperature
    if temperature is not None:
        temperature = checked_temperature(f"{where}.temperature", temperature)
    loss = _checked_loss(f"{where}.loss", given.loss, on_label)
    return Edge(
        _checked_gate(f"{where}.gate", given.gate),
        loss,
        checked_number(f"{where}.weight", given.weight),
        temperature,
        _checked_connector(f"{where}.connector", given.connector, loss, on_label),
        _checked_delay(f"{where}.delay", given.delay, on_label),
    )


def _checked_delay(where: str, given: Any, on_label: bool) -> int:
    is_number = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not is_number or not 0 <= given <= MOST_DELAY:
        raise InputError(where, given, f"a whole number of updates from 0 to {MOST_DELAY:,}")
    if given and on_label:
        raise InputError(where, given, "0: a label is never late")
    return int(given)


def _checked_gate(where: str, gate: Any) -> str:
    if not isinstance(gate, str) or gate not in gate_names():
        raise InputError(where, gate, ", ".join(gate_names()) + did_you_mean(gate, gate_names()))
    return gate


def _checked_loss(where: str, loss: Any, on_label: bool) -> str | dict[str, float]:
    """A loss, or several with their weights, each by the one text that says it."""
    if isinstance(loss, str):
        return checked_loss(where, loss, on_label)
    if not isinstance(loss, Mapping) or not loss:
        allowed = ", ".join(loss_names(on_label))
        raise InputError(where, loss, f"{allowed}, or an object of several with their weights")
    found: dict[str, float] = {}
    for given, weight in loss.items():
        name = checked_loss(where, given, on_label)
        if name in found:
            raise InputError(where, given, f"each loss once ({name})")
        found[name] = checked_number(f"{where}.{name}", weight)
    return found


def _checked_connector(
    where: str, given: Any, loss: str | Mapping[str, float], on_label: bool
) -> str | None:
    """The one text of a connector that something on the edge has a use for."""
    if given is None:
        return None
    if on_label:
        raise InputError(where, given, "null: a label edge has one end")
    kinds = connector_kinds(where, given)
    losses = [named_loss(name) for name in ([loss] if isinstance(loss, str) else loss)]
    on_stages = [CONNECTORS[kind][0] == "stages" for kind in kinds]
    if any(on_stages) and not any(each.needs_stages for each in losses):
        raise InputError(where, given, "linear or linear_linear: no loss of the edge is on stages")
    if not all(on_stages) and all(each.needs_stages for each in losses):
        raise InputError(where, given, "conv or conv_conv: all losses of the edge are on stages")
    return "+".join(kinds)


def matrix_shape(num_nodes: int) -> str:
    """What a matrix of a graph's edges must be, in words."""
    return f"{num_nodes} rows of {num_nodes} gates (one row and one column a node)"


def checked_edges(
    field: str, given: Any, num_nodes: int, former: EdgeMatrix | None = None
) -> EdgeMatrix:
    """Checks that there is an N x N matrix of edges; names change the gates of the former ones."""

    def is_row(row: Any) -> bool:
        return isinstance(row, Sequence | np.ndarray) and not isinstance(row, str)

    shape = matrix_shape(num_nodes)
    if not is_row(given) or len(given) != num_nodes:
        raise InputError(field, given, shape)
    rows = []
    for t, row in enumerate(given):
        if not is_row(row) or len(row) != num_nodes:
            raise InputError(f"{field}[{t}]", row, shape)
        rows.append(
            tuple(checked_edge(f"{field}[{t}][{s}]", edge, s == t) for s, edge in enumerate(row))
        )
        if former is not None:
            rows[t] = tuple(
                dataclasses.replace(former[t][s], gate=str(edge)) if isinstance(edge, str) else e
                for s, (edge, e) in enumerate(zip(row, rows[t], strict=True))
            )
    return tuple(rows)
