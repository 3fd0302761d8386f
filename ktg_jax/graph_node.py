"""The description of a node of a graph: its fields, their checks, and how they are written."""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ktg_jax.errors import InputError

MATCHINGS = ("initialise", "assignment", "none")
"""How a prior's filters meet a student's; see `ktg_jax.representing.match_prior`."""

SCHEDULES = ("linear", "constant")
"""How a prior's weight goes over the training."""

NO_PRIOR = "nothing: the node has no prior"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Node:
    """A network of the graph.

    Attributes:
        model: name of a registered model, such as `resnet32`.
        name: unique within its graph: letters, digits, `_`, `.` and `-`. A node's initial weights
            depend on its name and the seed alone. None: the graph names it `<model>-<index>`.
        weights: where its initial weights come from (a run's folder, or one node of it as
            `DIR:name`); None: random initialisation.
        prior: where a prior for its kernels is (a file of `save_prior`, or its folder); None: it
            has none, and the other fields of the prior say nothing.
        prior_weight: of the prior's loss, beside the node's edges; finite, not negative. 0: the
            prior only acts on how the node begins.
        prior_quantile: in [0, 1], of the sparse recoding penalty on the prior's gradient.
        prior_schedule: "linear": the weight falls to 0 over the training; "constant": it stays.
        prior_matching: "initialise": the node starts from the prior's kernels; "assignment": the
            prior's filters are assigned to the node's initial ones; "none": neither.
        projection: where the readers are through which others see its stage outputs (a file of
            `save_readers`, or its folder); None: they see them as they are. For frozen nodes.

    >>> Node("resnet32", name="teacher", weights="runs/teacher").model
    'resnet32'
    """

    model: str
    name: str | None = None
    weights: str | None = None
    prior: str | None = None
    prior_weight: float = 1.0
    prior_quantile: float = 0.7
    prior_schedule: str = "linear"
    prior_matching: str = "initialise"
    projection: str | None = None

    @property
    def prior_options(self) -> dict[str, Any]:
        """What the node says of its prior, by field; empty where it has none.

        >>> Node("cnn").prior_options, Node("cnn", prior="runs/a").prior_options["prior_quantile"]
        ({}, 0.7)
        """
        if self.prior is None:
            return {}
        return {field: getattr(self, field) for field in ("prior", *PRIOR_DEFAULTS)}

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, those of prior and projection only where there are such."""
        plain = {"name": self.name, "model": self.model, "weights": self.weights}
        projection = {} if self.projection is None else {"projection": self.projection}
        return plain | self.prior_options | projection


PRIOR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Node)
    if field.name.startswith("prior_")
}
"""The options that only a node with a prior may have."""


def checked_nodes(nodes: Iterable[Node | str]) -> tuple[Node, ...]:
    """Checks the nodes and names those that have no name.

    Raises:
        InputError: names the first node and field that is wrong.
    """
    if isinstance(nodes, str) or not isinstance(nodes, Iterable):
        raise InputError("nodes", nodes, "a sequence of nodes")
    named: list[Node] = []
    for i, given in enumerate(nodes):
        node = Node(given) if isinstance(given, str) else given
        if not isinstance(node, Node):
            raise InputError(f"nodes[{i}]", given, "a Node or a model's name")
        if not isinstance(node.model, str) or not node.model:
            raise InputError(f"nodes[{i}].model", node.model, "a model's name")
        if node.weights is not None and not isinstance(node.weights, str):
            raise InputError(f"nodes[{i}].weights", node.weights, "a path, or null")
        if not (node.projection is None or (isinstance(node.projection, str) and node.projection)):
            raise InputError(f"nodes[{i}].projection", node.projection, "a path, or null")
        name = f"{node.model}-{i}" if node.name is None else node.name
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"nodes[{i}].name", name, "letters, digits, '_', '.' and '-'")
        if name in (other.name for other in named):
            raise InputError(f"nodes[{i}].name", name, "a name that no other node has")
        named.append(dataclasses.replace(_with_checked_prior(f"nodes[{i}]", node), name=name))
    if not named:
        raise InputError("nodes", nodes, "at least one node")
    return tuple(named)


def _with_checked_prior(where: str, node: Node) -> Node:
    if node.prior is None:
        for field, default in PRIOR_DEFAULTS.items():
            if getattr(node, field) != default:
                raise InputError(f"{where}.{field}", getattr(node, field), NO_PRIOR)
        return node
    if not isinstance(node.prior, str) or not node.prior:
        raise InputError(f"{where}.prior", node.prior, "a path, or null")
    if not is_number(node.prior_weight) or not 0 <= node.prior_weight < math.inf:
        raise InputError(f"{where}.prior_weight", node.prior_weight, "a finite number, at least 0")
    if not is_number(node.prior_quantile) or not 0 <= node.prior_quantile <= 1:
        raise InputError(f"{where}.prior_quantile", node.prior_quantile, "a number from 0 to 1")
    for field, names in (("prior_schedule", SCHEDULES), ("prior_matching", MATCHINGS)):
        if getattr(node, field) not in names:
            raise InputError(f"{where}.{field}", getattr(node, field), ", ".join(names))
    weight, quantile = float(node.prior_weight), float(node.prior_quantile)
    return dataclasses.replace(node, prior_weight=weight, prior_quantile=quantile)


def is_number(value: Any) -> bool:
    """Whether it is a number as JSON knows them: no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
